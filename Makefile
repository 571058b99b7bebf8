# Tools are pinned here and nowhere else.
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOTESTSUM   := gotest.tools/gotestsum@v1.13.0
GOVULNCHECK := golang.org/x/vuln/cmd/govulncheck@latest
BENCHSTAT   := golang.org/x/perf/cmd/benchstat@v0.0.0-20260908200009-22c9c6c9d4da

BIN  := bin/gatehouse
FUZZ ?= 20s

# With EVALUATOR=topdown, policies are evaluated by it where nothing is set, so that
# the tests of a binary can be run with either evaluator.
EVALUATOR ?= plan
TOPDOWN   := -X github.com/gatehouse-authz/gatehouse/policy.autoEvaluator=topdown

# The version is that of the commit, or what VERSION says.
GO_BUILD = CGO_ENABLED=0 go build -trimpath -buildvcs=auto -ldflags='-s -w$(if $(VERSION), -X main.release=$(VERSION))$(if $(filter topdown,$(EVALUATOR)), $(TOPDOWN))'

.DEFAULT_GOAL := help

.PHONY: help
help: ## Say what can be made
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

.PHONY: build
build: ## Build bin/gatehouse
	$(GO_BUILD) -o $(BIN) ./cmd/gatehouse

.PHONY: envoy
envoy: ## Fetch the pinned Envoy binaries into .cache
	@e2e/fetch-envoy

.PHONY: tools
tools: envoy ## Build the S3 server, the ill network and the oracle of the tests into .cache
	@e2e/fetch-tools

.PHONY: proxies
proxies: ## Install nginx and Caddy, which the tests put before the HTTP API
	@e2e/fetch-proxies

.PHONY: demo
demo: bin/demo ## Show it: three tenants in S3 behind a real Envoy, and a page (DEMO_ONCE=1 ends it)
	@bin/demo -gatehouse $(BIN) -envoy .cache/envoy-1.40.0 -s3 .cache/versitygw-1.8.0

.PHONY: bin/demo
bin/demo: build
	@e2e/fetch-envoy 1.40.0
	@e2e/fetch-tools versitygw
	@cd e2e && go build -o ../bin/demo ./demo

# The image holds the static binary, certificates and the name of a user; the same
# sources give the same bytes.
IMAGES     ?= bin/image
IMAGE      ?= gatehouse:dev
PLATFORMS  ?= amd64 arm64

.PHONY: image
image: $(PLATFORMS:%=$(IMAGES)/gatehouse-linux-%) ## Build the image for amd64 and arm64: bin/image/gatehouse-ARCH.tar for "docker load"
	cd e2e && go run ./image -out $(abspath $(IMAGES)) -name $(IMAGE) $(if $(VERSION),-version $(VERSION)) $(abspath $^)

.PHONY: $(PLATFORMS:%=$(IMAGES)/gatehouse-linux-%)
$(PLATFORMS:%=$(IMAGES)/gatehouse-linux-%):
	GOARCH=$(@:$(IMAGES)/gatehouse-linux-%=%) GOOS=linux $(GO_BUILD) -o $@ ./cmd/gatehouse

.PHONY: image-e2e
image-e2e: image sbom ## Hold the image to its format, build it twice and compare, read the list of its modules
	cd e2e && GATEHOUSE_IMAGES=$(abspath $(IMAGES)) go run $(GOTESTSUM) --format testname -- -count=1 -timeout 15m ./image

.PHONY: compose
compose: compose-images ## Run the demo of deploy/compose, with the Docker engine that is there
	docker load --quiet --input $(IMAGES)/gatehouse-$$(go env GOARCH).tar
	docker load --quiet --input $(IMAGES)/gatehouse-demo.tar
	docker compose --file deploy/compose/compose.yaml up --detach --wait
	@echo "The order desk is at http://localhost:10080, traces at http://localhost:16686, metrics at http://localhost:9090."
	@echo "End it with: docker compose --file deploy/compose/compose.yaml down"

.PHONY: compose-images
compose-images: $(IMAGES)/gatehouse-linux-$(shell go env GOARCH)
	cd e2e && CGO_ENABLED=0 GOOS=linux go build -trimpath -buildvcs=auto -ldflags='-s -w' -o $(abspath $(IMAGES))/demo ./demo
	cd e2e && go run ./image -out $(abspath $(IMAGES)) -name $(IMAGE) -demo $(abspath $(IMAGES))/demo -root $(CURDIR) $(abspath $<)

.PHONY: compose-e2e
compose-e2e: compose-images ## Run the demo of deploy/compose in a Docker engine of its own, and test it from outside (as root)
	@e2e/fetch-docker
	@e2e/fetch-envoy 1.40.0
	@e2e/fetch-tools versitygw otelcol prometheus jaeger docker-compose
	cd e2e && GATEHOUSE_IMAGES=$(abspath $(IMAGES)) go run $(GOTESTSUM) --format standard-verbose -- -count=1 -timeout 10m ./compose

.PHONY: sbom
sbom: build ## Say of which modules bin/gatehouse is made: bin/gatehouse.cdx.json (CycloneDX)
	@e2e/fetch-tools cyclonedx-gomod
	.cache/cyclonedx-gomod-1.10.0 bin -json -std -noserial -notimestamp -output bin/gatehouse.cdx.json $(BIN)

.PHONY: test
test: lint unit allocs e2e js ## Lint, unit tests with the race detector, allocations, e2e with real Envoy and S3, the JavaScript

# -pgo=off: a profile of cmd/gatehouse would have all that it imports compiled once more.
.PHONY: unit
unit: ## Unit tests, recorded vectors and fuzz seeds, with the race detector
	go run $(GOTESTSUM) --format pkgname --rerun-fails=1 --rerun-fails-max-failures=2 --packages ./... -- -race -pgo=off -timeout 5m

.PHONY: unit-topdown
unit-topdown: ## Unit tests and vectors with policies evaluated by topdown
	go test -ldflags "$(TOPDOWN)" -pgo=off -timeout 5m ./...

# Without the race detector, which allocates itself.
.PHONY: allocs
allocs: ## Hold the allocations of a check to testdata/allocs.txt (UPDATE=1 writes it anew)
	go test -run '^TestAllocations$$' -count=1 -v . $(if $(UPDATE),-update)

.PHONY: e2e
e2e: build tools proxies ## End-to-end tests with real Envoy, nginx, Caddy and a real S3 server
	cd e2e && GATEHOUSE_BIN=$(CURDIR)/$(BIN) go run $(GOTESTSUM) --format testname -- -count=1 -timeout 10m $$(cd $(CURDIR)/e2e && go list ./... | grep -vE '/(faults|compose|image|observe)$$')

.PHONY: web-tools
web-tools: ## Install Node, npm and Chromium from Debian's packages, where they are missing
	@e2e/fetch-web

%/node_modules/.package-lock.json: %/package.json %/package-lock.json
	@e2e/fetch-web nodejs npm
	cd $* && npm ci --ignore-scripts --no-audit --no-fund
	@touch $@

.PHONY: js
js: build clients/js/node_modules/.package-lock.json e2e/clients/node_modules/.package-lock.json ## Lint, build and test clients/js, and OPA's JavaScript client against the binary
	cd clients/js && npm test
	cd e2e/clients && GATEHOUSE_BIN=$(CURDIR)/$(BIN) npm test

.PHONY: web
web: bin/demo web-tools e2e/web/node_modules/.package-lock.json ## Chromium at the demo's order desk (screenshots in e2e/web/screenshots)
	@e2e/fetch-tools opa
	cd e2e/web && GATEHOUSE_DEMO=$(CURDIR)/bin/demo GATEHOUSE_BIN=$(CURDIR)/$(BIN) GATEHOUSE_E2E_VERSITYGW=$(CURDIR)/.cache/versitygw-1.8.0 npm test

# Some faults are held to times, generous ones, which a machine with others on it
# can miss: a fault or two that fail are run once more, visibly.
.PHONY: faults
faults: build tools ## Break what it depends on, flood it, stop it (GATEHOUSE_FAULTS_SOAK=8h adds a soak)
	cd e2e && GATEHOUSE_BIN=$(CURDIR)/$(BIN) go run $(GOTESTSUM) --format standard-verbose --rerun-fails=1 --rerun-fails-max-failures=4 \
		--packages ./faults -- -count=1 -timeout $(or $(FAULTS_TIMEOUT),20m)

# The schemas are in Go modules: downloaded whole, and checked by Go's checksum
# database. Building egctl takes some minutes, once.
.PHONY: kubernetes-tools
kubernetes-tools: ## Build helm, kubeconform and egctl into .cache, and download the published schemas
	@e2e/fetch-envoy 1.40.0
	@e2e/fetch-tools helm kubeconform egctl
	@cd / && for m in $$(cat $(CURDIR)/e2e/kubernetes/schemas.txt); do GOFLAGS= GOWORK=off go mod download $$m || exit 1; done

.PHONY: kubernetes
kubernetes: build kubernetes-tools ## The Helm chart and the manifests of deploy, to their schemas and, translated, to a real Envoy
	cd e2e/kubernetes && go vet ./... && go run $(STATICCHECK) ./... && \
		GATEHOUSE_BIN=$(CURDIR)/$(BIN) go run $(GOTESTSUM) --format testname -- -count=1 -timeout 10m ./...

.PHONY: lint
lint: ## gofmt, vet and staticcheck
	@test -z "$$(gofmt -l .)" || { gofmt -d .; exit 1; }
	go vet ./...
	go run $(STATICCHECK) ./...
	cd e2e && go vet ./... && go run $(STATICCHECK) ./...

# BENCH has flags, such as "-only check -rounds 1", "-markdown", "-json FILE" or
# "-base OTHER-BINARY"; PEER names a binary of opa-envoy-plugin.
.PHONY: bench
bench: build ## What a check costs beside an always-allow server, batches, lists, through a real Envoy (BENCH="-only check -rounds 1")
	@e2e/fetch-envoy 1.40.0
	cd e2e && go run ./bench -gatehouse $(CURDIR)/$(BIN) $(BENCH)

.PHONY: bench-stages
bench-stages: ## Go benchmarks of the stages (BASE=commit compares, COUNT, TIME, BENCH_PACKAGES)
	BENCHSTAT=$(BENCHSTAT) PACKAGES="$(BENCH_PACKAGES)" e2e/bench-stages

.PHONY: bench-density
bench-density: build ## What idle tenants take: memory, goroutines, time until they are warm (BENCH="-tenants 1000 -data 0,10")
	cd e2e && go run ./bench -gatehouse $(CURDIR)/$(BIN) -only density $(BENCH)

.PHONY: bench-cpu
bench-cpu: build ## CPU quotas, GOMAXPROCS and batch sizes: p99 and throttling, as root; draws docs/cpu.svg
	cd e2e && go run ./bench -gatehouse $(CURDIR)/$(BIN) -only cpu -plot $(CURDIR)/docs/cpu.svg $(BENCH)

# The compiler optimises for what the profile has seen: cmd/gatehouse/default.pgo,
# which every build finds by itself.
.PHONY: pgo
pgo: build ## Record CPU profiles under the load of bench into cmd/gatehouse/default.pgo
	cd e2e && go run ./bench -gatehouse $(CURDIR)/$(BIN) -only pgo -profile $(CURDIR)/cmd/gatehouse/default.pgo $(BENCH)

.PHONY: observe
observe: build ## Test the alerts, and ask a real Prometheus every query of dashboards and alerts
	@e2e/fetch-tools prometheus promtool
	cd e2e && GATEHOUSE_BIN=$(CURDIR)/$(BIN) go run $(GOTESTSUM) --format testname -- -count=1 -timeout 5m ./observe

.PHONY: simulate
simulate: ## What a fleet would do with many tenants: docs/scale.md quotes it
	@cd e2e && go run ./simulate

.PHONY: docs
docs: ## Write the generated parts of docs/ anew
	go test ./cmd/gatehouse -run "TestManual|TestMetrics" -count=1 -update
	cd e2e && go test ./simulate -run TestReport -count=1 -update

.PHONY: fuzz
fuzz: ## Fuzz each target for FUZZ (default 20s), or those that match ONLY
	@for target in $$(grep -rlE '^func Fuzz' --include='*_test.go' . | xargs grep -hoE '^func Fuzz[A-Za-z]+' /dev/null | sort -u | sed 's/.*func //' | grep -E '$(or $(ONLY),.)'); do \
		pkg=$$(dirname $$(grep -rlE "^func $$target\(" --include='*_test.go' . | head -1)); \
		echo "$$pkg $$target"; go test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZ) -fuzzminimizetime 5s $$pkg || exit 1; \
	done

# What was made faster must answer as what it took the place of. Each run takes
# other policies: the seed is printed, and gives the same ones again. The fuzzer of
# Go is too slow for them, as it instruments all of OPA.
SEED ?= $(shell date +%s)

.PHONY: fuzz-differential
fuzz-differential: ## Compare with oracles: plans with topdown (SEED=), builtins and tokens with OPA's, wire bytes with protobuf
	PLAN_POLICIES=2000 PLAN_SEED=$(SEED) go test ./plan -run TestGenerated -v -timeout 15m
	@$(MAKE) --no-print-directory fuzz FUZZ=10s ONLY='Native|Tokens|Wire|Slice|KeptInput|Redact|Document'

.PHONY: vuln
vuln: ## Look for known vulnerabilities (needs the vulnerability database)
	go run $(GOVULNCHECK) ./...

.PHONY: clean
clean: ## Remove what was built; the cache of fetched tools stays
	rm -rf bin
