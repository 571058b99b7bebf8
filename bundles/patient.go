package bundles

import (
	"net/http"
	"runtime"
	"sync"
	"weak"
)

// patientTransports are shared as the transports that they are made of are: the
// bounds on connections hold for all who wait.
var patientTransports sync.Map // :: weak.Pointer[http.Transport] → *http.Transport

// patient returns a client that is like client, and does not mind how long the
// headers of an answer take: the request's context bounds that.
func patient(client *http.Client) *http.Client {
	t, ok := client.Transport.(*http.Transport)
	if !ok || t.ResponseHeaderTimeout == 0 {
		return client
	}
	key := weak.Make(t)
	shared, ok := patientTransports.Load(key)
	if !ok {
		clone := t.Clone()
		clone.ResponseHeaderTimeout = 0
		if shared, ok = patientTransports.LoadOrStore(key, clone); !ok {
			runtime.AddCleanup(t, forget, key)
		}
	}
	own := *client
	own.Transport = shared.(*http.Transport)
	return &own
}

// forget drops what was made of a transport that is no more.
func forget(key weak.Pointer[http.Transport]) {
	if shared, ok := patientTransports.LoadAndDelete(key); ok {
		shared.(*http.Transport).CloseIdleConnections()
	}
}
