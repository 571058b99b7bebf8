package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"crypto/x509"
	"debug/buildinfo"
	"debug/elf"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

// root is the folder of the repository.
func root(t *testing.T) string {
	t.Helper()
	module, err := stage.Module()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Dir(module)
}

// built is the folder where "make image" leaves the images.
func built(t *testing.T) string {
	t.Helper()
	dir := os.Getenv("GATEHOUSE_IMAGES")
	if dir == "" {
		t.Fatal("GATEHOUSE_IMAGES does not name the folder of the images: run make image-e2e")
	}
	return dir
}

// untar returns the files of an archive, and their headers.
func untar(t *testing.T, r io.Reader) (files map[string][]byte, headers []*tar.Header) {
	t.Helper()
	files = map[string][]byte{}
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return files, headers
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		files[h.Name] = data
		headers = append(headers, h)
	}
}

type described struct {
	MediaType, Digest string
	Size              int64
	Platform          struct{ Architecture, OS string }
}

// The archives are what their format asks for, and their images hold a static binary
// for their platform, certificates and a user, and nothing that can be written.
func TestArchives(t *testing.T) {
	for name, platforms := range map[string][]string{
		"gatehouse-amd64.tar": {"amd64"}, "gatehouse-arm64.tar": {"arm64"}, "gatehouse.tar": {"amd64", "arm64"},
	} {
		t.Run(name, func(t *testing.T) {
			file, err := os.Open(filepath.Join(built(t), name))
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			files, _ := untar(t, file)
			for path, data := range files {
				if digest, ok := strings.CutPrefix(path, "blobs/sha256/"); ok {
					if sum := sha256.Sum256(data); hex.EncodeToString(sum[:]) != digest {
						t.Errorf("%s has other contents than its name says", path)
					}
				}
			}
			blob := func(d described) []byte {
				t.Helper()
				data, ok := files["blobs/"+strings.Replace(d.Digest, ":", "/", 1)]
				if !ok || int64(len(data)) != d.Size {
					t.Fatalf("blob %+v: got %d bytes", d, len(data))
				}
				return data
			}
			parse := func(data []byte, v any) {
				t.Helper()
				if err := json.Unmarshal(data, v); err != nil {
					t.Fatalf("%v: %s", err, data)
				}
			}
			var list struct{ Manifests []described }
			parse(files["index.json"], &list)
			if _, docker := files["manifest.json"]; docker != (len(platforms) == 1) {
				t.Errorf("manifest.json for docker load is there: %v", docker)
			}
			if len(platforms) > 1 {
				parse(blob(list.Manifests[0]), &list)
			}
			if len(list.Manifests) != len(platforms) {
				t.Fatalf("got %d images, want %v", len(list.Manifests), platforms)
			}
			for i, d := range list.Manifests {
				if d.Platform.Architecture != platforms[i] || d.Platform.OS != "linux" {
					t.Errorf("got an image for %+v, want %s", d.Platform, platforms[i])
				}
				var manifest struct {
					Config described
					Layers []described
				}
				parse(blob(d), &manifest)
				var conf struct {
					Created, Architecture string
					Config                struct {
						User, StopSignal string
						Healthcheck      struct{ Test []string }
						Labels           map[string]string
					}
					RootFS struct {
						DiffIDs []string `json:"diff_ids"`
					}
				}
				parse(blob(manifest.Config), &conf)
				if conf.Architecture != platforms[i] || conf.Config.User != "65532:65532" || conf.Config.StopSignal != "SIGTERM" ||
					!slices.Equal(conf.Config.Healthcheck.Test, []string{"CMD", "/gatehouse", "health"}) || conf.Config.Labels["org.opencontainers.image.version"] == "" {
					t.Errorf("configuration of the image: %+v", conf)
				}
				layer, err := gzip.NewReader(bytes.NewReader(blob(manifest.Layers[0])))
				if err != nil {
					t.Fatal(err)
				}
				text, err := io.ReadAll(layer)
				if err != nil {
					t.Fatal(err)
				}
				if sum := sha256.Sum256(text); conf.RootFS.DiffIDs[0] != "sha256:"+hex.EncodeToString(sum[:]) {
					t.Error("the layer is another than the configuration says")
				}
				checkRoot(t, text, platforms[i])
			}
		})
	}
}

// checkRoot checks the files of an image.
func checkRoot(t *testing.T, layer []byte, arch string) {
	t.Helper()
	files, headers := untar(t, bytes.NewReader(layer))
	for _, h := range headers {
		if h.Uid != 0 || h.Gid != 0 || h.Mode&0o022 != 0 || h.Mode&0o6000 != 0 {
			t.Errorf("%s belongs to %d:%d and has mode %o: its user could write there", h.Name, h.Uid, h.Gid, h.Mode)
		}
	}
	binary, err := elf.NewFile(bytes.NewReader(files["gatehouse"]))
	if err != nil {
		t.Fatal(err)
	}
	machine := map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}[arch]
	if libraries, _ := binary.ImportedLibraries(); binary.Machine != machine || binary.Section(".interp") != nil || len(libraries) > 0 {
		t.Errorf("the binary is for %v, and linked to %v, want a static one for %v", binary.Machine, libraries, machine)
	}
	if !strings.Contains(string(files["etc/passwd"]), ":65532:65532:") || !strings.Contains(string(files["etc/group"]), ":65532:") {
		t.Errorf("no user in %q and %q", files["etc/passwd"], files["etc/group"])
	}
	certs := 0
	for rest := files["etc/ssl/certs/ca-certificates.crt"]; ; certs++ {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if cert, err := x509.ParseCertificate(block.Bytes); err != nil || !cert.IsCA {
			t.Errorf("certificate %d: %v", certs, err)
		}
	}
	if certs < 100 {
		t.Errorf("got %d certificates, want those of all authorities", certs)
	}
}

// Two copies of the sources in different places, built with and without what was
// built before, give the same bytes.
func TestReproducible(t *testing.T) {
	from := root(t)
	one, two := filepath.Join(t.TempDir(), "a"), filepath.Join(t.TempDir(), "another", "place")
	snapshot(t, from, one)
	if err := os.MkdirAll(filepath.Dir(two), 0o755); err != nil {
		t.Fatal(err)
	}
	must(t, nil, from, "cp", "-a", one, two)
	build := func(dir string, env ...string) map[string]string {
		t.Helper()
		must(t, env, dir, "make", "image", "IMAGES=out", "PLATFORMS="+runtime.GOARCH)
		sums := map[string]string{}
		for _, name := range []string{"gatehouse-linux-" + runtime.GOARCH, "gatehouse-" + runtime.GOARCH + ".tar"} {
			data, err := os.ReadFile(filepath.Join(dir, "out", name))
			if err != nil {
				t.Fatal(err)
			}
			sums[name] = fmt.Sprintf("%x", sha256.Sum256(data))
		}
		return sums
	}
	got, want := build(one), build(two, "GOCACHE="+t.TempDir())
	for name, sum := range want {
		if got[name] != sum {
			t.Errorf("%s: got sha256 %s in one place and %s in another", name, got[name], sum)
		}
	}
	t.Log(want)
}

// snapshot copies the sources as they are, with their history.
func snapshot(t *testing.T, from, to string) {
	t.Helper()
	if _, err := os.Stat(filepath.Join(from, ".git")); err != nil {
		t.Fatalf("the sources are not a git repository, whose history the build records: %v", err)
	}
	must(t, nil, from, "git", "clone", "--quiet", "--no-hardlinks", ".", to)
	for name := range strings.SplitSeq(strings.TrimSuffix(must(t, nil, from, "git", "ls-files", "-z", "--deleted"), "\x00"), "\x00") {
		if name == "" {
			continue
		}
		if err := os.Remove(filepath.Join(to, name)); err != nil {
			t.Fatal(err)
		}
	}
	for name := range strings.SplitSeq(strings.TrimSuffix(must(t, nil, from, "git", "ls-files", "-z", "--modified", "--others", "--exclude-standard"), "\x00"), "\x00") {
		info, err := os.Lstat(filepath.Join(from, name))
		if name == "" || err != nil || !info.Mode().IsRegular() {
			continue // deleted, or a link
		}
		data, err := os.ReadFile(filepath.Join(from, name))
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(to, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, data, info.Mode().Perm()); err != nil {
			t.Fatal(err)
		}
	}
}

func must(t *testing.T, env []string, dir, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	// What a make above this one says is not for the one that it runs.
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "MAKE") && !strings.HasPrefix(v, "MFLAGS") {
			cmd.Env = append(cmd.Env, v)
		}
	}
	cmd.Dir, cmd.Env = dir, append(cmd.Env, env...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, out, stderr.String())
	}
	return string(out)
}

// The list of what is in the binary is the binary's own.
func TestSBOM(t *testing.T) {
	binary := filepath.Join(root(t), "bin", "gatehouse")
	text, err := os.ReadFile(binary + ".cdx.json")
	if err != nil {
		t.Fatalf("run make sbom: %v", err)
	}
	var bom struct {
		BOMFormat, SpecVersion string
		Metadata               struct {
			Component struct{ Name, Version string }
		}
		Components []struct {
			Name, Version, PURL string
			Hashes              []struct{ Alg, Content string }
		}
	}
	if err := json.Unmarshal(text, &bom); err != nil {
		t.Fatal(err)
	}
	info, err := buildinfo.ReadFile(binary)
	if err != nil {
		t.Fatal(err)
	}
	if bom.BOMFormat != "CycloneDX" || bom.SpecVersion != "1.6" || bom.Metadata.Component.Name != info.Main.Path || bom.Metadata.Component.Version != info.Main.Version {
		t.Errorf("got %s %s of %+v, want CycloneDX 1.6 of %s %s", bom.BOMFormat, bom.SpecVersion, bom.Metadata.Component, info.Main.Path, info.Main.Version)
	}
	got := map[string]string{}
	for _, c := range bom.Components {
		got[c.Name] = c.Version
		if !strings.HasPrefix(c.PURL, "pkg:golang/"+c.Name+"@") {
			t.Errorf("%s has the package URL %q", c.Name, c.PURL)
		}
	}
	if got["github.com/open-policy-agent/opa"] == "" || got["std"] != info.GoVersion {
		t.Errorf("got OPA %q and the standard library %q, want %s", got["github.com/open-policy-agent/opa"], got["std"], info.GoVersion)
	}
	delete(got, "std")
	for _, dep := range info.Deps {
		if got[dep.Path] != dep.Version {
			t.Errorf("%s: got %q, want %q", dep.Path, got[dep.Path], dep.Version)
		}
		delete(got, dep.Path)
	}
	if len(got) > 0 {
		t.Errorf("these are not in the binary: %v", got)
	}
}
