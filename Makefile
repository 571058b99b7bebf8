# Tools are pinned here and nowhere else.
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOTESTSUM   := gotest.tools/gotestsum@v1.13.0
GOVULNCHECK := golang.org/x/vuln/cmd/govulncheck@latest

BIN  := bin/gatehouse
FUZZ ?= 20s

.DEFAULT_GOAL := help

.PHONY: help
help: ## Say what can be made
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

.PHONY: build
build: ## Build bin/gatehouse
	CGO_ENABLED=0 go build -trimpath -o $(BIN) ./cmd/gatehouse

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

.PHONY: test
test: lint unit e2e js ## Lint, unit tests with the race detector, e2e with real Envoy and S3, the JavaScript

.PHONY: unit
unit: ## Unit tests, recorded vectors and fuzz seeds, with the race detector
	go run $(GOTESTSUM) --format pkgname --rerun-fails=1 --rerun-fails-max-failures=2 --packages ./... -- -race -timeout 5m

.PHONY: e2e
e2e: build tools proxies ## End-to-end tests with real Envoy, nginx, Caddy and a real S3 server
	cd e2e && GATEHOUSE_BIN=$(CURDIR)/$(BIN) go run $(GOTESTSUM) --format testname -- -timeout 10m $$(cd $(CURDIR)/e2e && go list ./... | grep -v /faults)

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

.PHONY: lint
lint: ## gofmt, vet and staticcheck
	@test -z "$$(gofmt -l .)" || { gofmt -d .; exit 1; }
	go vet ./...
	go run $(STATICCHECK) ./...
	cd e2e && go vet ./... && go run $(STATICCHECK) ./...

.PHONY: bench
bench: build ## CPU per check against an always-allow server, and Go benchmarks of the stages
	cd e2e && go run ./bench -gatehouse $(CURDIR)/$(BIN) && go run ./bench -gatehouse $(CURDIR)/$(BIN) -tenants 1000
	go test -run '^$$' -bench . -benchmem ./policy ./tenants ./extauthz ./decisionlog ./httpserve ./bundles

.PHONY: fuzz
fuzz: ## Fuzz each target for FUZZ (default 20s)
	@for target in $$(grep -rlE '^func Fuzz' --include='*_test.go' . | xargs grep -hoE '^func Fuzz[A-Za-z]+' /dev/null | sort -u | sed 's/.*func //'); do \
		pkg=$$(dirname $$(grep -rlE "^func $$target\(" --include='*_test.go' . | head -1)); \
		echo "$$pkg $$target"; go test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZ) -fuzzminimizetime 5s $$pkg || exit 1; \
	done

.PHONY: vuln
vuln: ## Look for known vulnerabilities (needs the vulnerability database)
	go run $(GOVULNCHECK) ./...

.PHONY: clean
clean: ## Remove what was built; the cache of fetched tools stays
	rm -rf bin
