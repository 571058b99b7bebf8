package main

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"mime"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/evanw/esbuild/pkg/api"
)

// desk is the server behind the order desk, as deploy/demo/web/README.md has it:
// the page, the login of its users, and data that last as long as the demo. It
// decides about no request: what reaches it was let in.
type desk struct {
	Addr string

	teams  *teams
	server *http.Server

	mu       sync.Mutex
	orders   []order   // guarded by mu
	products []product // guarded by mu
}

// order is one of the team "orders".
type order struct {
	ID       string  `json:"id"`
	Customer string  `json:"customer"`
	Total    float64 `json:"total"`
	Status   string  `json:"status"` // open, shipped, cancelled or refunded
}

// product is one of the team "storefront".
type product struct {
	ID        string  `json:"id"`
	Title     string  `json:"title"`
	Price     float64 `json:"price"`
	Published bool    `json:"published"`
}

var (
	deskUsers = []string{"alice", "bob", "carol"}
	deskTeams = []string{"orders", "storefront"}
)

const (
	sessionCookie = "__Host-session"
	sessionTime   = 15 * time.Minute
	deskIssuer    = "order-desk"
	maxDeskBody   = 64 << 10
)

// startDesk starts the server of the page that is in the repository at root.
func startDesk(root string, t *teams, addr string) (*desk, error) {
	d := &desk{
		teams: t,
		orders: []order{
			{"1001", "Mensah & Sons", 129.9, "open"},
			{"1002", "Café Lumière", 58.4, "shipped"},
			{"1003", "Ode Okafor", 412, "open"},
			{"1004", "Haus am See", 76.25, "open"},
			{"1005", "Ines Duarte", 23.5, "cancelled"},
		},
		products: []product{
			{"lamp", "Reading lamp", 49.9, true},
			{"chair", "Oak chair", 129, true},
			{"vase", "Blue vase", 18.5, false},
		},
	}
	mux := http.NewServeMux()
	if err := d.pages(mux, root); err != nil {
		return nil, err
	}
	mux.HandleFunc("GET /session", d.session)
	mux.HandleFunc("POST /session", d.login)
	mux.HandleFunc("DELETE /session", d.logout)
	mux.HandleFunc("GET /stage/roles", d.roles)
	mux.HandleFunc("PUT /stage/roles/{team}/{user}/{role}", d.grant)
	mux.HandleFunc("GET /orders", d.listOrders)
	mux.HandleFunc("POST /orders", d.createOrder)
	mux.HandleFunc("POST /orders/{id}/ship", d.turn("open", "shipped"))
	mux.HandleFunc("POST /orders/{id}/refund", d.turn("shipped", "refunded"))
	mux.HandleFunc("DELETE /orders/{id}", d.turn("open", "cancelled"))
	mux.HandleFunc("GET /storefront/products", d.listProducts)
	mux.HandleFunc("PUT /storefront/products/{id}", d.price)
	mux.HandleFunc("POST /storefront/products/{id}/publish", d.publish)
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { say(w, http.StatusNotFound, "there is no such page") })

	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, err
	}
	d.Addr = l.Addr().String()
	d.server = &http.Server{Handler: mux, ErrorLog: log.New(io.Discard, "", 0)}
	go d.server.Serve(l) //nolint:errcheck // it ends with Close
	return d, nil
}

// Close stops the server.
func (d *desk) Close() { _ = d.server.Close() }

// ---- The page.

// pageHeaders are those of each file of the page: it loads what is its own, runs
// nothing that is inline, and stands in no frame.
var pageHeaders = map[string]string{
	"Cache-Control": "no-cache",
	"Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; " +
		"base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
	"X-Content-Type-Options":     "nosniff",
	"Referrer-Policy":            "no-referrer",
	"Cross-Origin-Opener-Policy": "same-origin",
}

// pages serves the files of the page, and the client library that it imports.
func (d *desk) pages(mux *http.ServeMux, root string) error {
	public := filepath.Join(root, "deploy", "demo", "web", "public")
	for path, name := range map[string]string{
		"/{$}": "index.html", "/desk.js": "desk.js", "/desk.css": "desk.css", "/icon.svg": "icon.svg",
	} {
		text, err := os.ReadFile(filepath.Join(public, name))
		if err != nil {
			return err
		}
		page(mux, path, name, text)
	}
	text, err := os.ReadFile(filepath.Join(root, "clients", "js", "src", "index.ts"))
	if err != nil {
		return err
	}
	// The library without its types: as npm builds it, and needs no Node.
	script := api.Transform(string(text), api.TransformOptions{Loader: api.LoaderTS, Format: api.FormatESModule, Target: api.ES2022})
	if len(script.Errors) > 0 {
		return fmt.Errorf("clients/js/src/index.ts: %s", script.Errors[0].Text)
	}
	page(mux, "/permissions.js", "permissions.js", script.Code)
	return nil
}

func page(mux *http.ServeMux, path, name string, text []byte) {
	kind := map[string]string{
		".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8",
		".css": "text/css; charset=utf-8", ".svg": "image/svg+xml",
	}[filepath.Ext(name)]
	mux.HandleFunc("GET "+path, func(w http.ResponseWriter, _ *http.Request) {
		for k, v := range pageHeaders {
			w.Header().Set(k, v)
		}
		w.Header().Set("Content-Type", kind)
		_, _ = w.Write(text) // the client is gone
	})
}

// ---- Who is there.

// session says who is logged in, and until when.
func (d *desk) session(w http.ResponseWriter, r *http.Request) {
	var claims struct {
		Sub string `json:"sub"`
		Exp int64  `json:"exp"`
	}
	cookie, err := r.Cookie(sessionCookie)
	if err != nil || !verify(cookie.Value, &claims) || time.Now().Unix() >= claims.Exp {
		answer(w, http.StatusOK, map[string]any{"user": nil, "expires": 0})
		return
	}
	answer(w, http.StatusOK, map[string]any{"user": claims.Sub, "expires": claims.Exp})
}

// login makes the visitor whom they say they are.
func (d *desk) login(w http.ResponseWriter, r *http.Request) {
	var who struct{ User string }
	if !read(w, r, &who) {
		return
	}
	if !slices.Contains(deskUsers, who.User) {
		say(w, http.StatusBadRequest, "user is not one of the demo's")
		return
	}
	expires := time.Now().Add(sessionTime).Unix()
	setSession(w, sessionOf(who.User, expires), int(sessionTime.Seconds()))
	answer(w, http.StatusOK, map[string]any{"user": who.User, "expires": expires})
}

func (d *desk) logout(w http.ResponseWriter, _ *http.Request) {
	setSession(w, "", -1)
	w.WriteHeader(http.StatusNoContent)
}

// sessionOf returns the token of a user of the desk.
func sessionOf(user string, expires int64) string {
	return sign(map[string]any{"iss": deskIssuer, "aud": deskTeams, "sub": user, "exp": expires})
}

// setSession sets the cookie for so many seconds; -1 removes it.
func setSession(w http.ResponseWriter, token string, seconds int) {
	http.SetCookie(w, &http.Cookie{
		Name: sessionCookie, Value: token, Path: "/", Secure: true, HttpOnly: true, SameSite: http.SameSiteLaxMode,
		MaxAge: seconds,
	})
}

// ---- The stage, where a visitor plays the operator.

func (d *desk) roles(w http.ResponseWriter, _ *http.Request) {
	all := map[string]map[string][]string{}
	for _, team := range deskTeams {
		roles, err := d.teams.roles(team)
		if err != nil {
			say(w, http.StatusInternalServerError, err.Error())
			return
		}
		all[team] = roles
	}
	answer(w, http.StatusOK, all)
}

func (d *desk) grant(w http.ResponseWriter, r *http.Request) {
	var role struct{ Granted *bool }
	if !read(w, r, &role) {
		return
	}
	if role.Granted == nil {
		say(w, http.StatusBadRequest, "granted is neither true nor false")
		return
	}
	switch err := d.teams.grant(r.PathValue("team"), r.PathValue("user"), r.PathValue("role"), *role.Granted); {
	case errors.Is(err, errTeam) || errors.Is(err, errUser):
		say(w, http.StatusNotFound, err.Error())
	case err != nil:
		say(w, http.StatusInternalServerError, err.Error())
	default:
		w.WriteHeader(http.StatusNoContent)
	}
}

// ---- The data.

func (d *desk) listOrders(w http.ResponseWriter, _ *http.Request) {
	d.mu.Lock()
	defer d.mu.Unlock()
	answer(w, http.StatusOK, map[string]any{"orders": d.orders})
}

func (d *desk) createOrder(w http.ResponseWriter, r *http.Request) {
	var o struct {
		Customer string
		Total    float64
	}
	if !read(w, r, &o) {
		return
	}
	if o.Customer == "" || o.Total <= 0 {
		say(w, http.StatusBadRequest, "customer and total are needed")
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	made := order{ID: strconv.Itoa(1001 + len(d.orders)), Customer: o.Customer, Total: o.Total, Status: "open"}
	d.orders = append(d.orders, made)
	answer(w, http.StatusCreated, made)
}

// turn changes the status of an order that has another one.
func (d *desk) turn(from, to string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		d.mu.Lock()
		defer d.mu.Unlock()
		for i := range d.orders {
			o := &d.orders[i]
			if o.ID != r.PathValue("id") {
				continue
			}
			if o.Status != from {
				say(w, http.StatusConflict, "the order is "+o.Status)
				return
			}
			o.Status = to
			answer(w, http.StatusOK, o)
			return
		}
		say(w, http.StatusNotFound, "there is no such order")
	}
}

func (d *desk) listProducts(w http.ResponseWriter, _ *http.Request) {
	d.mu.Lock()
	defer d.mu.Unlock()
	answer(w, http.StatusOK, map[string]any{"products": d.products})
}

func (d *desk) price(w http.ResponseWriter, r *http.Request) {
	var next struct{ Price float64 }
	if !read(w, r, &next) {
		return
	}
	if next.Price <= 0 {
		say(w, http.StatusBadRequest, "price is not more than 0")
		return
	}
	d.change(w, r, func(p *product) { p.Price = next.Price })
}

// publish shows what is hidden, and hides what is shown.
func (d *desk) publish(w http.ResponseWriter, r *http.Request) {
	d.change(w, r, func(p *product) { p.Published = !p.Published })
}

func (d *desk) change(w http.ResponseWriter, r *http.Request, change func(*product)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := range d.products {
		if p := &d.products[i]; p.ID == r.PathValue("id") {
			change(p)
			answer(w, http.StatusOK, p)
			return
		}
	}
	say(w, http.StatusNotFound, "there is no such product")
}

// ---- JSON, in and out.

// read reads the body of a request, or says why not. A form of another page's
// cannot have this content type.
func read(w http.ResponseWriter, r *http.Request, v any) bool {
	if kind, _, _ := mime.ParseMediaType(r.Header.Get("Content-Type")); kind != "application/json" {
		say(w, http.StatusUnsupportedMediaType, "the body is not application/json")
		return false
	}
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxDeskBody)).Decode(v); err != nil {
		say(w, http.StatusBadRequest, "the body cannot be read")
		return false
	}
	return true
}

func say(w http.ResponseWriter, status int, what string) {
	answer(w, status, map[string]string{"error": what})
}

func answer(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // the client is gone
}

// ---- Tokens.

// secret is that of the data of all teams.
const secret = "a secret of the demo: use a key of your own, or a JWKS"

// sign returns a token with these claims.
func sign(claims map[string]any) string {
	body, err := json.Marshal(claims)
	if err != nil {
		panic(err) // claims of ours that are no JSON
	}
	text := encode([]byte(`{"alg":"HS256","typ":"JWT"}`)) + "." + encode(body)
	return text + "." + encode(mac(text))
}

// verify reads the claims of a token, and reports whether it is one of ours.
func verify(token string, claims any) bool {
	i := strings.LastIndexByte(token, '.')
	if i < 0 || !hmac.Equal([]byte(token[i+1:]), []byte(encode(mac(token[:i])))) {
		return false
	}
	_, body, _ := strings.Cut(token[:i], ".")
	text, err := base64.RawURLEncoding.DecodeString(body)
	return err == nil && json.Unmarshal(text, claims) == nil
}

func mac(text string) []byte {
	h := hmac.New(sha256.New, []byte(secret))
	h.Write([]byte(text))
	return h.Sum(nil)
}

func encode(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }
