// Package oci writes container images, without a container engine.
//
// An image is a list of files and what an engine needs to know to run them. The
// same image always gives the same bytes: files are sorted, their times are that
// of the image, and nothing of the machine that writes it gets in.
//
// An archive is an image layout of the Open Container Initiative
// (https://github.com/opencontainers/image-spec/blob/v1.1.1/image-layout.md),
// which registries' tools push, with a manifest.json beside it, which "docker load"
// reads.
package oci

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash"
	"io"
	"os"
	"path"
	"slices"
	"strings"
	"time"
)

// File is a file of an image, or a folder. Folders above it need not be listed.
type File struct {
	Path string // without a slash at its beginning
	Mode int64  // permissions; 0: 0755 of a folder, 0644 of another
	UID  int    // owner, and group
	Data []byte // what it has, or
	From string // the file of this machine that it is a copy of, or
	Link string // where it points to
	Dir  bool
}

// Image is an image for one platform.
type Image struct {
	Name     string // "host/name:tag"
	Arch     string // of Linux: amd64, arm64
	Created  time.Time
	Files    []File
	Config   Config
	Compress bool // its layer with gzip: smaller, and slower to write
}

// Config says how an image is run
// (https://github.com/opencontainers/image-spec/blob/v1.1.1/config.md).
type Config struct {
	User         string              `json:"User,omitempty"`
	ExposedPorts map[string]struct{} `json:"ExposedPorts,omitempty"`
	Env          []string            `json:"Env,omitempty"`
	Entrypoint   []string            `json:"Entrypoint,omitempty"`
	Cmd          []string            `json:"Cmd,omitempty"`
	Healthcheck  *Healthcheck        `json:"Healthcheck,omitempty"` // Docker's; others pass over it
	WorkingDir   string              `json:"WorkingDir,omitempty"`
	Labels       map[string]string   `json:"Labels,omitempty"`
	StopSignal   string              `json:"StopSignal,omitempty"`
}

// Healthcheck is how Docker asks a container for its health.
type Healthcheck struct {
	Test        []string      `json:"Test"`
	Interval    time.Duration `json:"Interval,omitempty"`
	Timeout     time.Duration `json:"Timeout,omitempty"`
	StartPeriod time.Duration `json:"StartPeriod,omitempty"`
	Retries     int           `json:"Retries,omitempty"`
}

const (
	indexType    = "application/vnd.oci.image.index.v1+json"
	manifestType = "application/vnd.oci.image.manifest.v1+json"
	configType   = "application/vnd.oci.image.config.v1+json"
	layerType    = "application/vnd.oci.image.layer.v1.tar"
)

type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int64             `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`
	Platform    *platform         `json:"platform,omitempty"`
}

type platform struct {
	Arch string `json:"architecture"`
	OS   string `json:"os"`
}

type manifest struct {
	SchemaVersion int          `json:"schemaVersion"`
	MediaType     string       `json:"mediaType"`
	Config        descriptor   `json:"config"`
	Layers        []descriptor `json:"layers"`
}

type index struct {
	SchemaVersion int          `json:"schemaVersion"`
	MediaType     string       `json:"mediaType"`
	Manifests     []descriptor `json:"manifests"`
}

type config struct {
	Created string  `json:"created"`
	Arch    string  `json:"architecture"`
	OS      string  `json:"os"`
	Config  Config  `json:"config"`
	RootFS  rootFS  `json:"rootfs"`
	History []event `json:"history"`
}

type rootFS struct {
	Type    string   `json:"type"`
	DiffIDs []string `json:"diff_ids"`
}

type event struct {
	Created string `json:"created"`
	By      string `json:"created_by"`
}

// loaded is an entry of the manifest.json that "docker load" reads.
type loaded struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// Write writes an archive with images that have one name: one for each platform.
// One with several platforms has no manifest.json, since "docker load" would take
// the last of them.
func Write(w io.Writer, images ...Image) error {
	if len(images) == 0 {
		return fmt.Errorf("writing an archive without an image")
	}
	a := &archive{w: tar.NewWriter(w), when: images[0].Created, has: map[string]bool{}}
	all := index{SchemaVersion: 2, MediaType: indexType}
	var docker []loaded
	if err := a.add("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`)); err != nil {
		return err
	}
	for _, image := range images {
		d, l, err := a.image(image)
		if err != nil {
			return fmt.Errorf("writing image %s for %s: %w", image.Name, image.Arch, err)
		}
		all.Manifests, docker = append(all.Manifests, d), append(docker, l)
	}
	name := map[string]string{"org.opencontainers.image.ref.name": images[0].Name, "io.containerd.image.name": images[0].Name}
	top := index{SchemaVersion: 2, MediaType: indexType}
	if len(images) == 1 {
		all.Manifests[0].Annotations = name
		top.Manifests = all.Manifests
		text, err := json.Marshal(docker)
		if err != nil {
			return err
		}
		if err := a.add("manifest.json", text); err != nil {
			return err
		}
	} else {
		d, err := a.blob(indexType, all)
		if err != nil {
			return err
		}
		d.Annotations = name
		top.Manifests = []descriptor{d}
	}
	text, err := json.Marshal(top)
	if err != nil {
		return err
	}
	if err := a.add("index.json", text); err != nil {
		return err
	}
	return a.w.Close()
}

// archive is one that is being written.
type archive struct {
	w    *tar.Writer
	when time.Time
	has  map[string]bool // :: path
}

// image writes the parts of an image.
func (a *archive) image(image Image) (d descriptor, l loaded, err error) {
	file, err := os.CreateTemp("", "layer-")
	if err != nil {
		return d, l, err
	}
	defer func() {
		file.Close()
		os.Remove(file.Name())
	}()
	blob, diff, err := layer(file, image)
	if err != nil {
		return d, l, err
	}
	if _, err := file.Seek(0, io.SeekStart); err != nil {
		return d, l, err
	}
	if err := a.copy(blobPath(blob.Digest), blob.Size, file); err != nil {
		return d, l, err
	}
	created := image.Created.UTC().Format(time.RFC3339)
	conf, err := a.blob(configType, config{
		Created: created, Arch: image.Arch, OS: "linux", Config: image.Config,
		RootFS:  rootFS{Type: "layers", DiffIDs: []string{diff}},
		History: []event{{Created: created, By: "gatehouse/e2e/oci"}},
	})
	if err != nil {
		return d, l, err
	}
	d, err = a.blob(manifestType, manifest{SchemaVersion: 2, MediaType: manifestType, Config: conf, Layers: []descriptor{blob}})
	d.Platform = &platform{Arch: image.Arch, OS: "linux"}
	return d, loaded{Config: blobPath(conf.Digest), RepoTags: []string{image.Name}, Layers: []string{blobPath(blob.Digest)}}, err
}

// layer writes the files of an image as a layer, and returns what it is and the
// digest of its uncompressed bytes.
func layer(w io.Writer, image Image) (d descriptor, diff string, err error) {
	files, err := complete(image.Files)
	if err != nil {
		return d, "", err
	}
	outer := &summer{w: w, hash: sha256.New()}
	inner := &summer{w: outer, hash: sha256.New()}
	kind := layerType
	var zip *gzip.Writer
	if image.Compress {
		kind += "+gzip"
		zip = gzip.NewWriter(outer) // without a name or a time
		inner.w = zip
	}
	t := tar.NewWriter(inner)
	for _, f := range files {
		if err := f.write(t, image.Created); err != nil {
			return d, "", fmt.Errorf("file %s: %w", f.Path, err)
		}
	}
	if err := t.Close(); err != nil {
		return d, "", err
	}
	if zip != nil {
		if err := zip.Close(); err != nil {
			return d, "", err
		}
	}
	return descriptor{MediaType: kind, Digest: outer.digest(), Size: outer.size}, inner.digest(), nil
}

// complete returns the files sorted, and with the folders that they are in.
func complete(files []File) ([]File, error) {
	all := map[string]File{}
	for _, f := range files {
		if f.Path == "" || f.Path != path.Clean(f.Path) || strings.HasPrefix(f.Path, "/") || strings.HasPrefix(f.Path, "..") {
			return nil, fmt.Errorf("path %q is not clean and relative", f.Path)
		}
		if _, twice := all[f.Path]; twice {
			return nil, fmt.Errorf("file %s is there twice", f.Path)
		}
		all[f.Path] = f
	}
	for _, f := range files {
		for dir := path.Dir(f.Path); dir != "."; dir = path.Dir(dir) {
			if above, ok := all[dir]; !ok {
				all[dir] = File{Path: dir, Dir: true}
			} else if !above.Dir {
				return nil, fmt.Errorf("%s of file %s is no folder", dir, f.Path)
			}
		}
	}
	var sorted []File
	for _, f := range all {
		sorted = append(sorted, f)
	}
	slices.SortFunc(sorted, func(a, b File) int { return strings.Compare(a.Path, b.Path) })
	return sorted, nil
}

func (f File) write(t *tar.Writer, when time.Time) error {
	h := &tar.Header{Name: f.Path, Mode: f.Mode, Uid: f.UID, Gid: f.UID, ModTime: when.UTC().Truncate(time.Second), Format: tar.FormatPAX}
	switch {
	case f.Dir:
		h.Typeflag, h.Name = tar.TypeDir, f.Path+"/"
		if h.Mode == 0 {
			h.Mode = 0o755
		}
		return t.WriteHeader(h)
	case f.Link != "":
		h.Typeflag, h.Linkname, h.Mode = tar.TypeSymlink, f.Link, 0o777
		return t.WriteHeader(h)
	}
	h.Typeflag, h.Size = tar.TypeReg, int64(len(f.Data))
	if h.Mode == 0 {
		h.Mode = 0o644
	}
	var from io.Reader = bytes.NewReader(f.Data)
	if f.From != "" {
		file, err := os.Open(f.From)
		if err != nil {
			return err
		}
		defer file.Close()
		info, err := file.Stat()
		if err != nil {
			return err
		}
		from, h.Size = file, info.Size()
	}
	if err := t.WriteHeader(h); err != nil {
		return err
	}
	_, err := io.Copy(t, from)
	return err
}

// blob writes a value as JSON.
func (a *archive) blob(kind string, v any) (descriptor, error) {
	text, err := json.Marshal(v)
	if err != nil {
		return descriptor{}, err
	}
	sum := sha256.Sum256(text)
	d := descriptor{MediaType: kind, Digest: "sha256:" + hex.EncodeToString(sum[:]), Size: int64(len(text))}
	return d, a.add(blobPath(d.Digest), text)
}

func blobPath(digest string) string { return "blobs/" + strings.Replace(digest, ":", "/", 1) }

func (a *archive) add(name string, data []byte) error {
	return a.copy(name, int64(len(data)), bytes.NewReader(data))
}

// copy writes a file of the archive, unless it has it.
func (a *archive) copy(name string, size int64, from io.Reader) error {
	if a.has[name] {
		return nil
	}
	a.has[name] = true
	h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: size, ModTime: a.when.UTC().Truncate(time.Second), Format: tar.FormatPAX}
	if err := a.w.WriteHeader(h); err != nil {
		return err
	}
	_, err := io.Copy(a.w, from)
	return err
}

// summer adds up what is written through it.
type summer struct {
	w    io.Writer
	hash hash.Hash
	size int64
}

func (s *summer) Write(p []byte) (int, error) {
	n, err := s.w.Write(p)
	s.hash.Write(p[:n])
	s.size += int64(n)
	return n, err
}

func (s *summer) digest() string { return "sha256:" + hex.EncodeToString(s.hash.Sum(nil)) }
