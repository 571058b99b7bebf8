package httpserve

import (
	"net/http"
	"slices"
	"strings"
)

// secure sets the headers that every answer has.
func secure(h http.Header) {
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
	h.Set("Cross-Origin-Resource-Policy", "same-site")
	h.Set("Referrer-Policy", "no-referrer")
}

// What a page may send and see, beside what any may.
const (
	corsSends = "Authorization, Content-Type, Content-Encoding, If-None-Match, Last-Event-ID, X-Request-ID, X-Request-Timeout, Traceparent"
	corsSees  = "ETag, Retry-After, WWW-Authenticate, X-Request-ID"
	corsAge   = "7200" // seconds for which a browser remembers that it may ask
)

// cors answers what a browser asks before it asks, and lets the pages of the
// origins that the tenant names see the answer. It reports whether the request is
// answered.
func (s *Server) cors(w *recorder, r *request) (done bool, err error) {
	if r.route.foreign {
		return false, nil
	}
	h := w.Header()
	h.Add("Vary", "Origin")
	origins := r.Header.Values("Origin")
	if len(origins) > 1 {
		return false, errOrigin
	}
	listed := len(origins) == 1 && slices.Contains(r.Offers.Origins, origins[0])
	if listed {
		h.Set("Access-Control-Allow-Origin", origins[0])
		h.Set("Access-Control-Allow-Credentials", "true")
		h.Set("Access-Control-Expose-Headers", corsSees)
		h.Set("Cross-Origin-Resource-Policy", "cross-origin")
	}
	if r.Method != http.MethodOptions || r.route.methods == nil && r.Header.Get("Access-Control-Request-Method") == "" {
		return false, nil
	}
	h.Add("Vary", "Access-Control-Request-Method, Access-Control-Request-Headers")
	h.Set("Allow", strings.Join(append(slices.Clone(r.route.methods), http.MethodOptions), ", "))
	if len(origins) == 1 {
		if !listed {
			return false, errOrigin
		}
		allowed := r.route.methods
		if allowed == nil {
			allowed = []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"}
		}
		h.Set("Access-Control-Allow-Methods", strings.Join(allowed, ", "))
		h.Set("Access-Control-Allow-Headers", corsSends)
		h.Set("Access-Control-Max-Age", corsAge)
	}
	w.WriteHeader(http.StatusNoContent)
	return true, nil
}

// ownPage reports whether the request is one that no page has made, or a page of
// this server's own origin or of one that the tenant names. A browser adds
// cookies and certificates to the requests of any page.
func (r *request) ownPage() bool {
	origins := r.Header.Values("Origin")
	switch len(origins) {
	case 0:
		site := r.Header.Get("Sec-Fetch-Site")
		return site == "" || site == "same-origin" || site == "none"
	case 1:
		_, host, ok := strings.Cut(origins[0], "://")
		return slices.Contains(r.Offers.Origins, origins[0]) || ok && host == r.Host && r.Host != "" ||
			r.place.url != nil && origins[0] == r.place.url.Scheme+"://"+r.place.url.Host
	}
	return false
}

// safe reports whether the request's method changes nothing.
func (r *request) safe() bool {
	return r.Method == http.MethodGet || r.Method == http.MethodHead || r.Method == http.MethodOptions
}
