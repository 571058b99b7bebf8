package bundles

import (
	"io/fs"
	"syscall"
	"time"
)

// identity returns what tells apart two states of a file whose size and
// modification time are the same: tools can set the one and keep the other,
// and cannot set these.
func identity(info fs.FileInfo) (inode, device uint64, changed time.Time) {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return st.Ino, uint64(st.Dev), time.Unix(st.Ctim.Unix())
	}
	return 0, 0, info.ModTime()
}
