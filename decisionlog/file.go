package decisionlog

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
)

// FileConfig is that of a File.
type FileConfig struct {
	// Path is the file; its folder must be there.
	Path string

	// MaxBytes bounds the file, but for a single larger line: before it would
	// grow larger it becomes Path.1, what was Path.1 becomes Path.2, and so on.
	// Default 100 MiB.
	MaxBytes int64

	// MaxFiles is how many files are kept, the one that is written included.
	// Default 5.
	MaxFiles int
}

// File writes each event as a line of JSON to a file of mode 0600. The file is
// open only while something is written to it; others may remove or rename it in
// between. A line is whole: what a full disk cuts off is taken back, and written
// again when there is room. Several logs may write to one path if they agree on
// its bounds.
type File struct {
	path     string
	maxBytes int64
	maxFiles int
}

var _ Sink = (*File)(nil)

// NewFile returns a sink. A path that cannot be used is reported when events are
// delivered.
func NewFile(config FileConfig) *File {
	f := &File{path: filepath.Clean(config.Path), maxBytes: config.MaxBytes, maxFiles: cmp.Or(max(config.MaxFiles, 0), 5)}
	if f.maxBytes <= 0 {
		f.maxBytes = 100 << 20
	}
	return f
}

// Identity implements Sink.
func (f *File) Identity() string { return identity(kindFile, f.path, f.maxBytes, f.maxFiles) }

func (f *File) kind() kind { return kindFile }

func (f *File) lane() string { return "decisionlog " + filepath.Dir(f.path) }

func (f *File) deliver(ctx context.Context, s *shared, c *chunk) error {
	unlock, err := s.lock(ctx, f.path)
	if err != nil {
		return err
	}
	defer unlock()
	if err := f.write(c); err != nil {
		return fmt.Errorf("writing decisions to a file: %w", err)
	}
	return nil
}

// write appends the rest of the chunk to the file, and to new ones as it becomes
// full.
func (f *File) write(c *chunk) error {
	file, size, err := f.open()
	if err != nil {
		return err
	}
	defer func() { file.Close() }()
	for c.done < len(c.body) {
		lines := linesWithin(c.body[c.done:], f.maxBytes-size)
		if lines == 0 && size > 0 {
			file.Close()
			if err := f.rotate(); err != nil {
				return err
			}
			if file, size, err = f.open(); err != nil {
				return err
			}
			continue
		}
		if lines == 0 {
			lines = bytes.IndexByte(c.body[c.done:], '\n') + 1
		}
		if _, err := file.Write(c.body[c.done : c.done+lines]); err != nil {
			return errors.Join(err, file.Truncate(size))
		}
		c.done += lines
		size += int64(lines)
	}
	return nil
}

// open opens the file for appending and returns its size. A line that was cut
// off, by the end of a process, is ended.
func (f *File) open() (*os.File, int64, error) {
	file, err := os.OpenFile(f.path, os.O_RDWR|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return nil, 0, err
	}
	info, err := file.Stat()
	if err != nil {
		file.Close()
		return nil, 0, err
	}
	size := info.Size()
	if size == 0 || !info.Mode().IsRegular() {
		return file, 0, nil
	}
	var last [1]byte
	if _, err = file.ReadAt(last[:], size-1); err == nil && last[0] != '\n' {
		_, err = io.WriteString(file, "\n")
		size++
	}
	if err != nil {
		file.Close()
		return nil, 0, err
	}
	return file, size, nil
}

// rotate makes the file the first of the old ones, and forgets the last.
func (f *File) rotate() error {
	for i := f.maxFiles - 1; i > 0; i-- {
		from := f.path
		if i > 1 {
			from += "." + strconv.Itoa(i-1)
		}
		if err := os.Rename(from, f.path+"."+strconv.Itoa(i)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if f.maxFiles == 1 {
		return os.Remove(f.path)
	}
	return nil
}

// linesWithin returns how many bytes at the start of text are whole lines that
// take at most limit bytes together.
func linesWithin(text []byte, limit int64) int {
	if limit <= 0 {
		return 0
	}
	return bytes.LastIndexByte(text[:min(int64(len(text)), limit)], '\n') + 1
}
