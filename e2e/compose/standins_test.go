package compose

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/gatehouse-authz/gatehouse/e2e/oci"
	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

// standIn is an image that others publish, made of the program of the same version.
type standIn struct {
	image  string // as compose.yaml names it, but for the version
	tool   string // as stage.Tool names it
	pinned string // the version of the tool, where the image counts otherwise
	tagged string // what the image calls that version
	path   string // of the program in the image
	config oci.Config
	linked bool // to libraries, which come from this machine
}

// The versions are those of the tools, and compose.yaml must have the same: nothing
// is pulled.
var standIns = []standIn{
	{image: "envoyproxy/envoy:distroless-v", tool: "envoy", path: "usr/local/bin/envoy", linked: true,
		config: oci.Config{User: "65532", Entrypoint: []string{"/usr/local/bin/envoy"}}},
	{image: "versity/versitygw:v", tool: "versitygw", path: "usr/local/bin/versitygw"},
	{image: "otel/opentelemetry-collector-contrib:", tool: "otelcol", path: "otelcol-contrib",
		config: oci.Config{User: "10001", Entrypoint: []string{"/otelcol-contrib"}}},
	// The module of Prometheus 3.15.0 is v0.315.0.
	{image: "prom/prometheus:v", tool: "prometheus", pinned: "0.315.0", tagged: "3.15.0", path: "bin/prometheus",
		config: oci.Config{User: "nobody", WorkingDir: "/prometheus", Entrypoint: []string{"/bin/prometheus"}}},
	// Jaeger 1.76.0 and 2.13.0 are one release.
	{image: "jaegertracing/jaeger:", tool: "jaeger", pinned: "1.76.0", tagged: "2.13.0", path: "cmd/jaeger/jaeger-linux",
		config: oci.Config{User: "10001", Entrypoint: []string{"/cmd/jaeger/jaeger-linux"}}},
}

// name is that of the image, with the version.
func (s standIn) name() (string, error) {
	pin := stage.Pin(s.tool)
	switch {
	case s.tagged == "":
		return s.image + pin, nil
	case s.pinned == pin:
		return s.image + s.tagged, nil
	}
	return "", fmt.Errorf("%s is pinned at %s, and the tag of its image is known for %s alone", s.tool, pin, s.pinned)
}

// loadImages has the engine load the images of gatehouse, which "make
// compose-images" wrote, and the stand-ins.
func loadImages() error {
	dir := os.Getenv("GATEHOUSE_IMAGES")
	if dir == "" {
		return errors.New("GATEHOUSE_IMAGES does not name the folder of the images: run make compose-e2e")
	}
	for _, name := range []string{"gatehouse-" + runtime.GOARCH + ".tar", "gatehouse-demo.tar"} {
		file, err := os.Open(filepath.Join(dir, name))
		if err != nil {
			return fmt.Errorf("no image, run make compose-images: %w", err)
		}
		_, err = command(commandTime, file, "docker", "load", "--quiet")
		file.Close()
		if err != nil {
			return err
		}
	}
	for _, s := range standIns {
		if err := s.load(); err != nil {
			return fmt.Errorf("making a stand-in of %s: %w", s.image, err)
		}
	}
	return nil
}

func (s standIn) load() error {
	program, err := stage.Tool(s.tool)
	if err != nil {
		return err
	}
	name, err := s.name()
	if err != nil {
		return err
	}
	image := oci.Image{
		Name: name, Arch: runtime.GOARCH, Created: time.Unix(0, 0), Config: s.config,
		Files: []oci.File{
			{Path: s.path, Mode: 0o755, From: program},
			{Path: "etc/passwd", Data: []byte("root:x:0:0::/:/\nnobody:x:65534:65534::/:/\n")},
			{Path: "tmp", Dir: true, Mode: 0o1777},
		},
	}
	if s.linked {
		libraries, err := librariesOf(program)
		if err != nil {
			return err
		}
		image.Files = append(image.Files, libraries...)
	}
	r, w := io.Pipe()
	go func() { w.CloseWithError(oci.Write(w, image)) }()
	_, err = command(commandTime, r, "docker", "load", "--quiet")
	r.Close() // ends the writer, where the reader has ended before it
	return err
}

// librariesOf returns the libraries that a program is linked to, and its loader,
// where it looks for them.
func librariesOf(program string) ([]oci.File, error) {
	var files []oci.File
	has := map[string]bool{}
	add := func(path string) error {
		real, err := filepath.EvalSymlinks(path)
		if err != nil {
			return err
		}
		files = append(files, oci.File{Path: path[1:], Mode: 0o755, From: real})
		return nil
	}
	for todo := []string{program}; len(todo) > 0; todo = todo[1:] {
		file, err := elf.Open(todo[0])
		if err != nil {
			return nil, err
		}
		if section := file.Section(".interp"); section != nil && todo[0] == program {
			loader, err := section.Data()
			if err != nil {
				return nil, err
			}
			path := string(bytes.TrimRight(loader, "\x00"))
			has[filepath.Base(path)] = true
			if err := add(path); err != nil {
				return nil, err
			}
		}
		needed, err := file.ImportedLibraries()
		file.Close()
		if err != nil {
			return nil, err
		}
		for _, name := range needed {
			if has[name] {
				continue
			}
			has[name] = true
			found, err := filepath.Glob("/lib/*-linux-gnu/" + name)
			if err != nil || len(found) == 0 {
				return nil, fmt.Errorf("no library %s on this machine", name)
			}
			if err := add(found[0]); err != nil {
				return nil, err
			}
			todo = append(todo, found[0])
		}
	}
	return files, nil
}
