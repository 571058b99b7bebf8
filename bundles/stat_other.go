//go:build !linux

package bundles

import (
	"io/fs"
	"time"
)

// identity returns what tells apart two states of a file whose size and
// modification time are the same: nothing that is known here.
func identity(info fs.FileInfo) (inode, device uint64, changed time.Time) {
	return 0, 0, info.ModTime()
}
