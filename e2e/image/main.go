// Command image writes the container image of gatehouse, without a container
// engine: the same bytes for the same sources, wherever it runs.
//
//	go run ./image -out DIR [-name gatehouse:dev] [-version V] [-epoch SECONDS] PATH...
//
// PATH is the binary for a platform, which says itself for which, of which version
// and of which commit it is; -version overrides the version. DIR gets
//
//	gatehouse-amd64.tar, gatehouse-arm64.tar   for "docker load"
//	gatehouse.tar                              all platforms in one, an OCI archive to push
//	rootfs/                                    the files of the image, for deploy/image/Dockerfile
//
// With -demo, a binary of e2e/demo, and -root, the repository, DIR also gets
// gatehouse-demo.tar, gatehouse-demo:dev: the services around it in deploy/compose.
//
// -epoch is the time of all files in the image, in seconds since 1970; default is
// SOURCE_DATE_EPOCH, or the time of the commit, or 0. Exit status: 0; 1 on a fault;
// 2 on bad usage.
package main

import (
	"bytes"
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/crypto/x509roots/fallback/bundle"

	"github.com/gatehouse-authz/gatehouse/e2e/oci"
)

func main() {
	err := run(os.Args[1:], os.Getenv("SOURCE_DATE_EPOCH"), os.Stdout)
	switch {
	case err == nil || errors.Is(err, flag.ErrHelp):
	case errors.Is(err, errUsage):
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(2)
	default:
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

var errUsage = errors.New("bad usage")

// uid is that of the user who runs gatehouse. It is a number in the image, so that
// a cluster can see that it is not root.
const uid = 65532

func run(args []string, epoch string, stdout io.Writer) error {
	flags := flag.NewFlagSet("image", flag.ContinueOnError)
	out := flags.String("out", "", "the `folder` to write to")
	name := flags.String("name", "gatehouse:dev", "what the image is called")
	version := flags.String("version", "", "its version, for a label")
	demo := flags.String("demo", "", "the binary of the demo's services")
	root := flags.String("root", "..", "the `folder` of the repository")
	flags.StringVar(&epoch, "epoch", epoch, "the time of all files, in `seconds` since 1970")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return err
	} else if err != nil {
		return errUsage
	}
	if *out == "" || flags.NArg() == 0 {
		return fmt.Errorf("%w: -out and a binary are needed", errUsage)
	}
	if err := os.MkdirAll(*out, 0o755); err != nil {
		return err
	}
	files := etc()
	if err := lay(filepath.Join(*out, "rootfs"), files); err != nil {
		return err
	}
	var images []oci.Image
	for _, binary := range flags.Args() {
		b, err := read(binary, epoch)
		if err != nil {
			return err
		}
		image := oci.Image{
			Name: *name, Arch: b.arch, Created: b.when, Compress: true,
			Files:  append(slices.Clone(files), oci.File{Path: "gatehouse", Mode: 0o755, From: binary}),
			Config: config(or(*version, b.version), b.revision),
		}
		images = append(images, image)
		if err := write(filepath.Join(*out, "gatehouse-"+b.arch+".tar"), stdout, image); err != nil {
			return err
		}
	}
	if *demo != "" {
		image, err := demoImage(*demo, *root, epoch)
		if err != nil {
			return err
		}
		if err := write(filepath.Join(*out, "gatehouse-demo.tar"), stdout, image); err != nil {
			return err
		}
	}
	return write(filepath.Join(*out, "gatehouse.tar"), stdout, images...)
}

func or(s, def string) string {
	if s == "" {
		return def
	}
	return s
}

// binary is what an executable says of itself.
type binary struct {
	arch, version, revision string
	when                    time.Time // of the commit; 1970 where it is not known
}

func read(path, epoch string) (binary, error) {
	info, err := buildinfo.ReadFile(path)
	if err != nil {
		return binary{}, err
	}
	b := binary{version: info.Main.Version, when: time.Unix(0, 0)}
	settings := map[string]string{}
	for _, s := range info.Settings {
		settings[s.Key] = s.Value
	}
	if settings["GOOS"] != "linux" || settings["CGO_ENABLED"] != "0" || settings["-trimpath"] != "true" {
		return b, fmt.Errorf("%s is not built for Linux with CGO_ENABLED=0 and -trimpath", path)
	}
	b.arch, b.revision = settings["GOARCH"], settings["vcs.revision"]
	if t := settings["vcs.time"]; t != "" {
		if b.when, err = time.Parse(time.RFC3339, t); err != nil {
			return b, fmt.Errorf("%s: time of the commit: %w", path, err)
		}
	}
	if epoch != "" {
		seconds, err := strconv.ParseInt(epoch, 10, 64)
		if err != nil || seconds < 0 {
			return b, fmt.Errorf("%w: epoch %q is not a number of seconds", errUsage, epoch)
		}
		b.when = time.Unix(seconds, 0)
	}
	return b, nil
}

// demoImage returns the image of the services around gatehouse: the binary of
// e2e/demo, and the files of the repository that it reads.
func demoImage(path, root, epoch string) (oci.Image, error) {
	b, err := read(path, epoch)
	if err != nil {
		return oci.Image{}, err
	}
	image := oci.Image{
		Name: "gatehouse-demo:dev", Arch: b.arch, Created: b.when, Compress: true,
		Files:  append(etc(), oci.File{Path: "demo", Mode: 0o755, From: path}),
		Config: oci.Config{User: fmt.Sprintf("%d:%d", uid, uid), Entrypoint: []string{"/demo"}, WorkingDir: "/", StopSignal: "SIGTERM"},
	}
	for _, from := range []string{"deploy/demo", "clients/js/src"} {
		err := filepath.WalkDir(filepath.Join(root, from), func(path string, entry fs.DirEntry, err error) error {
			if err != nil || entry.IsDir() {
				return err
			}
			name, err := filepath.Rel(root, path)
			image.Files = append(image.Files, oci.File{Path: "demo-files/" + filepath.ToSlash(name), From: path})
			return err
		})
		if err != nil {
			return image, err
		}
	}
	return image, nil
}

// config is what deploy/image/Dockerfile says, too; a test compares them.
func config(version, revision string) oci.Config {
	labels := map[string]string{
		"org.opencontainers.image.title":       "gatehouse",
		"org.opencontainers.image.description": "One authorization server for many teams, behind Envoy's ext_authz",
		"org.opencontainers.image.source":      "https://github.com/gatehouse-authz/gatehouse",
		"org.opencontainers.image.licenses":    "Apache-2.0",
		"org.opencontainers.image.version":     version,
		"org.opencontainers.image.revision":    revision,
	}
	for k, v := range labels {
		if v == "" {
			delete(labels, k)
		}
	}
	return oci.Config{
		User:         fmt.Sprintf("%d:%d", uid, uid),
		ExposedPorts: map[string]struct{}{"8181/tcp": {}, "8282/tcp": {}, "9191/tcp": {}},
		Env:          []string{"PATH=/"},
		Entrypoint:   []string{"/gatehouse"},
		Cmd:          []string{"serve", "-c", "/etc/gatehouse/gatehouse.yaml"},
		Healthcheck: &oci.Healthcheck{
			Test:     []string{"CMD", "/gatehouse", "health"},
			Interval: 5 * time.Second, Timeout: 3 * time.Second, StartPeriod: 30 * time.Second, Retries: 3,
		},
		WorkingDir: "/",
		Labels:     labels,
		StopSignal: "SIGTERM",
	}
}

// etc returns all files of the image but the binary.
func etc() []oci.File {
	return []oci.File{
		{Path: "etc/passwd", Data: fmt.Appendf(nil, "gatehouse:x:%d:%d:gatehouse:/:/sbin/nologin\n", uid, uid)},
		{Path: "etc/group", Data: fmt.Appendf(nil, "gatehouse:x:%d:\n", uid)},
		{Path: "etc/ssl/certs/ca-certificates.crt", Data: roots()},
		{Path: "etc/gatehouse", Dir: true}, // where gatehouse.yaml is mounted
	}
}

// roots returns the certificates that browsers of Mozilla trust. One that they
// trust for older certificates only, which a file cannot say, is left out.
func roots() []byte {
	var certs []string
	for root := range bundle.Roots() {
		if root.Constraint != nil {
			continue
		}
		certs = append(certs, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Certificate})))
	}
	slices.Sort(certs)
	return []byte(strings.Join(certs, ""))
}

// lay writes the files to a folder.
func lay(dir string, files []oci.File) error {
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	for _, f := range files {
		path := filepath.Join(dir, filepath.FromSlash(f.Path))
		if f.Dir {
			if err := os.MkdirAll(path, 0o755); err != nil {
				return err
			}
			continue
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, f.Data, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// write writes an archive, whole or not at all, and says what it is.
func write(path string, stdout io.Writer, images ...oci.Image) error {
	var b bytes.Buffer
	if err := oci.Write(&b, images...); err != nil {
		return err
	}
	if err := os.WriteFile(path+".new", b.Bytes(), 0o644); err != nil {
		return err
	}
	fmt.Fprintf(stdout, "%s  sha256:%x\n", path, sha256.Sum256(b.Bytes()))
	return os.Rename(path+".new", path)
}
