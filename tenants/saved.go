package tenants

import (
	"errors"
	"time"

	"github.com/gatehouse-authz/gatehouse/bundles"
)

// note tells the store, now and then, that what is saved is what the source has.
func (fs *feeds) note(f *feed) {
	f.mu.Lock()
	now := time.Now()
	due := fs.store != nil && f.reread != nil && !f.unsavable && now.Sub(f.noted) >= noteInterval
	if due {
		f.noted = now
	}
	f.mu.Unlock()
	if !due {
		return
	}
	if err := fs.store.Confirm(f.key, now); err != nil && !errors.Is(err, bundles.ErrNotSaved) {
		fs.metrics.failed("save")
		fs.log.Warn("saved bundle not confirmed", "bundle", f.name, "error", err)
	}
}

// settle ends the wait of a feed's newest bundle for its activation: it is saved
// if it decides for somebody, and not kept in either case.
func (fs *feeds) settle(f *feed, good bool) {
	f.mu.Lock()
	b := f.unsaved
	f.unsaved = nil
	if b != nil && good {
		f.noted = time.Now()
	}
	f.mu.Unlock()
	if b == nil || !good {
		return
	}
	if err := fs.store.Save(f.key, b); err != nil {
		fs.metrics.failed("save")
		fs.log.Error("bundle not saved, serving goes on", "bundle", f.name, "error", err)
	}
}

// saved gives f, whose source has failed with cause, the saved bundle. It
// returns cause where there is none.
func (fs *feeds) saved(f *feed, cause error) error {
	var status *bundles.StatusError
	known := errors.Is(cause, bundles.ErrNotFound) && !errors.As(cause, &status) // the source says that there is no such bundle
	if fs.store == nil || f.reread == nil || known {
		return cause
	}
	s, err := fs.store.Load(f.key, f.reread)
	if err == nil {
		var c content
		c, err = fs.library.prepare(s.Bundle, content{})
		s.Bundle.Done()
		if err == nil {
			f.mu.Lock()
			defer f.mu.Unlock()
			if f.loaded {
				return nil
			}
			f.content, f.etag, f.loaded = c, s.ETag, true
			f.checked, f.stale, f.err = s.ConfirmedAt, s.ConfirmedAt, cause
			fs.log.Warn("saved bundle is used, its source is away", "bundle", f.name, "stale_since", s.ConfirmedAt, "error", cause)
			return nil
		}
	}
	if !errors.Is(err, bundles.ErrNotSaved) {
		fs.metrics.failed("saved")
		fs.log.Error("saved bundle cannot be used", "bundle", f.name, "error", err)
	}
	return cause
}
