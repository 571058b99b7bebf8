// Command alwaysallow is the least that a server of ext_authz can be: grpc-go
// with its defaults, which allows every check without a look at it. Others are
// measured by what they need beyond it.
//
//	alwaysallow [-listen 127.0.0.1:0]
//
// It prints its address, and that of its admin listener, which answers every GET
// with its allocations, as Prometheus has them.
package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"net"
	"net/http"
	"runtime"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
)

func main() {
	listen := flag.String("listen", "127.0.0.1:0", "`address` to listen on")
	flag.Parse()
	l, err := net.Listen("tcp", *listen)
	if err != nil {
		log.Fatal(err)
	}
	admin, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	go func() { log.Fatal(http.Serve(admin, http.HandlerFunc(mallocs))) }()
	fmt.Println(l.Addr(), admin.Addr())
	s := grpc.NewServer()
	authv3.RegisterAuthorizationServer(s, server{})
	log.Fatal(s.Serve(l))
}

func mallocs(w http.ResponseWriter, _ *http.Request) {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	fmt.Fprintln(w, "go_memstats_mallocs_total", m.Mallocs)
}

type server struct{}

var allow = &authv3.CheckResponse{Status: &rpcstatus.Status{}}

func (server) Check(context.Context, *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	return allow, nil
}
