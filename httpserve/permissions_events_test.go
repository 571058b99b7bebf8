package httpserve_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gatehouse-authz/gatehouse/authztest"
	"github.com/gatehouse-authz/gatehouse/bundles"
	"github.com/gatehouse-authz/gatehouse/httpserve"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// listener reads a stream of events. It is a http.ResponseWriter that a test can
// stop reading.
type listener struct {
	header http.Header
	close  context.CancelFunc
	ended  chan struct{}

	mu       sync.Mutex
	status   int       // guarded by mu
	texts    []sent    // what was flushed; guarded by mu
	buffer   string    // guarded by mu
	deaf     bool      // it takes nothing more; guarded by mu
	deadline time.Time // for a write; guarded by mu
}

// sent is what was sent at once.
type sent struct {
	at   time.Time
	text string
}

func (l *listener) Header() http.Header { return l.header }

func (l *listener) WriteHeader(status int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.status = status
}

func (l *listener) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.status == 0 {
		l.status = 200
	}
	l.buffer += string(p)
	return len(p), nil
}

func (l *listener) FlushError() error {
	l.mu.Lock()
	deaf, deadline := l.deaf, l.deadline
	if !deaf {
		l.texts = append(l.texts, sent{time.Now(), l.buffer})
		l.buffer = ""
	}
	l.mu.Unlock()
	if deaf {
		time.Sleep(time.Until(deadline))
		return os.ErrDeadlineExceeded
	}
	return nil
}

func (l *listener) SetWriteDeadline(t time.Time) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.deadline = t
	return nil
}

// over reports whether the stream has ended.
func (l *listener) over() bool {
	select {
	case <-l.ended:
		return true
	default:
		return false
	}
}

// events returns the texts that are no signs of life, since the last time.
func (l *listener) events() (texts []sent) {
	synctest.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.texts {
		if s.text != ":\n\n" {
			texts = append(texts, s)
		}
	}
	l.texts = nil
	return texts
}

// listen opens a stream of events.
func (s *lists) listen(t *testing.T, token string, header ...string) *listener {
	ctx, cancel := context.WithCancel(t.Context())
	r := httptest.NewRequestWithContext(ctx, "GET", "http://localhost/t/orders/v1/me/permissions/events", nil)
	r.Header.Set("Authorization", "Bearer "+token)
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	l := &listener{header: http.Header{}, close: cancel, ended: make(chan struct{})}
	go func() {
		defer close(l.ended)
		s.ServeHTTP(l, r)
	}()
	synctest.Wait()
	return l
}

func eventOf(version string) string {
	return fmt.Sprintf("event: permissions\nid: %s\ndata: {\"version\":%q}\n\n", version, version)
}

// Those whose list has changed are told, once, soon, and nobody else.
func TestEvents(t *testing.T) {
	const byUser = `package permissions

catalog := {"x": ["a", "b", "c"]}

allow if input.action.name in data.grants[input.subject.id]
-- .manifest --
{"revision": "%d"}
-- data.json --
{"grants": {"ada": [%s], "ben": ["b"]}}
`
	synctest.Test(t, func(t *testing.T) {
		s := listServer(t, fmt.Sprintf(byUser, 1, `"a"`), usersConfig("{package: permissions}", "ada", "ben"), httpserve.Config{}, nil)
		first := listIn(t, s.get(tokenOf("ada"))).Version
		ada, again, ben := s.listen(t, tokenOf("ada")), s.listen(t, tokenOf("ada"), "Last-Event-ID", first), s.listen(t, tokenOf("ben"))
		for name, want := range map[string]string{"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"} {
			if got := ada.header.Get(name); got != want {
				t.Errorf("got %s: %s, want %s", name, got, want)
			}
		}
		if got := ada.events(); len(got) != 1 || got[0].text != "retry: 2000\n\n"+eventOf(first) {
			t.Errorf("got %+v first", got)
		}
		if got := again.events(); len(got) != 1 || got[0].text != "retry: 2000\n\n" {
			t.Errorf("who has the version already got %+v", got)
		}
		ben.events()

		s.update(t, fmt.Sprintf(byUser, 2, `"a", "c"`))
		changed := time.Now()
		time.Sleep(time.Second)
		second := listIn(t, s.get(tokenOf("ada"))).Version
		for _, l := range []*listener{ada, again} {
			if got := l.events(); len(got) != 1 || got[0].text != eventOf(second) || got[0].at.Sub(changed) > 100*time.Millisecond {
				t.Errorf("got %+v, want version %s soon after %s", got, second, changed)
			}
		}
		s.update(t, fmt.Sprintf(byUser, 3, `"a", "c"`)) // says the same
		s.update(t, fmt.Sprintf(byUser, 4, `"a", "b"`)) // and what is over before it is told
		s.update(t, fmt.Sprintf(byUser, 5, `"a", "c"`))
		time.Sleep(time.Minute)
		for name, l := range map[string]*listener{"ada": ada, "ben": ben} {
			if got := l.events(); len(got) != 0 {
				t.Errorf("%s has got %+v, want no news", name, got)
			}
		}

		// One that is gone is no more counted.
		ada.close()
		again.close()
		<-ada.ended
		<-again.ended
		if _, _, streams := s.Remembered(); streams != 1 {
			t.Errorf("got %d streams, want ben's", streams)
		}
		s.Drain()
		<-ben.ended
		if _, _, streams := s.Remembered(); streams != 0 {
			t.Errorf("got %d streams after the drain", streams)
		}
	})
}

// A stream shows that it lives, keeps the tenant in use, and ends after a while.
func TestEventsHeartbeat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := listServer(t, fmt.Sprintf(versions, 2), usersConfig("{package: permissions}", "ada"), httpserve.Config{}, nil)
		l := s.listen(t, tokenOf("ada"))
		time.Sleep(5*time.Minute + time.Second)
		l.mu.Lock()
		if !l.deadline.IsZero() { // which over HTTP/2 would end it
			t.Errorf("got a deadline %s while nothing is to be written", l.deadline)
		}
		if n := len(l.texts); n != 16 || l.texts[1].text != ":\n\n" {
			t.Errorf("got %d texts, want one and 15 signs of life", n)
		}
		l.mu.Unlock()
		time.Sleep(time.Hour)
		if !l.over() {
			t.Error("it lasts longer than an hour")
		}
	})
}

// A stream ends with the credential, and says so.
func TestEventsExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := listServer(t, fmt.Sprintf(versions, 2), jwtUsers, httpserve.Config{}, nil)
		exp := time.Now().Add(90 * time.Second).Truncate(time.Second)
		l := s.listen(t, token(t, "exp", strconv.FormatInt(exp.Unix(), 10)))
		l.events()
		<-l.ended
		if got := l.events(); len(got) != 1 || got[0].text != "event: expired\ndata: {}\n\n" || !got[0].at.Equal(exp) {
			t.Errorf("got %+v, want the end at %s", got, exp)
		}
	})
}

// A stream ends when its tenant is gone, or says anew who may ask.
func TestEventsTenant(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := listServer(t, fmt.Sprintf(versions, 2), usersConfig("{package: permissions}", "ada"), httpserve.Config{},
			func(s *tenants.Settings) { s.Bundles[0].Final = true })
		l := s.listen(t, tokenOf("ada"))
		s.source.Fail("orders", bundles.ErrNotFound)
		time.Sleep(10 * time.Second)
		if !l.over() {
			t.Error("the tenant is gone, the stream is not")
		}
		if bytes, lists, streams := s.Remembered(); bytes != 0 || lists != 0 || streams != 0 {
			t.Errorf("got %d bytes, %d lists, %d streams of no tenant", bytes, lists, streams)
		}
	})
}

// Who has a stream is admitted anew when the tenant says otherwise who may ask.
func TestEventsSettings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := new(authztest.Memory)
		source.Set("orders", fmt.Sprintf(versions, 2))
		settings := func(users ...string) func(tenants.ID) (*tenants.Settings, error) {
			h := offers(t, usersConfig("{package: permissions}", users...))
			return authztest.Settings(source, func(_ tenants.ID, s *tenants.Settings) { s.HTTP = h })
		}
		s := new(lists)
		s.pool = authztest.Pool(t, tenants.Config{Settings: settings("ada", "ben"), Activated: func(id tenants.ID) { s.Activated(id) }})
		s.Server = server(t, httpserve.Config{Pool: s, Local: true})
		l := s.listen(t, tokenOf("ada"))
		if s.pool.Reload(tenants.Live{Settings: settings("ben")}) != 1 {
			t.Fatal("the tenant does not move")
		}
		synctest.Wait()
		if !l.over() {
			t.Error("the stream goes on by settings that are no more")
		}
		if w := s.get(tokenOf("ada")); w.Code != 401 {
			t.Errorf("got %d", w.Code)
		}
	})
}

// There are only so many streams: of a subject, of a tenant, and in all.
func TestEventsBounds(t *testing.T) {
	for name, c := range map[string]struct {
		permissions string
		streams     int
		subject     bool
	}{
		"subject": {"{package: permissions, subject_streams: 2}", 0, true},
		"tenant":  {"{package: permissions, streams: 2}", 0, false},
		"all":     {"{package: permissions}", 2, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := listServer(t, fmt.Sprintf(versions, 2), usersConfig(c.permissions, "ada", "ben"), httpserve.Config{Streams: c.streams}, nil)
				one, two := s.listen(t, tokenOf("ada")), s.listen(t, tokenOf("ada"))
				want := 503
				if c.subject {
					want = 429
				}
				three := s.listen(t, tokenOf("ada"))
				<-three.ended
				if three.status != want || three.header.Get("Retry-After") != "10" {
					t.Errorf("got %d, %v", three.status, three.header)
				}
				if ben := s.listen(t, tokenOf("ben")); c.subject != (ben.status == 200) {
					t.Errorf("another subject got %d", ben.status)
				}
				one.close()
				<-one.ended
				if four := s.listen(t, tokenOf("ada")); four.status != 200 {
					t.Errorf("got %d after one has left", four.status)
				}
				_ = two
				s.Drain()
			})
		})
	}
}

// Who does not read is cut off, and holds up nobody.
func TestEventsSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := listServer(t, fmt.Sprintf(versions, 2), usersConfig("{package: permissions}", "ada"), httpserve.Config{}, nil)
		slow, good := s.listen(t, tokenOf("ada")), s.listen(t, tokenOf("ada"))
		good.events()
		slow.mu.Lock()
		slow.deaf = true
		slow.mu.Unlock()
		s.update(t, fmt.Sprintf(versions, 4))
		time.Sleep(5 * time.Second)
		if got := good.events(); len(got) != 1 {
			t.Errorf("got %+v beside a slow one", got)
		}
		if slow.over() {
			t.Error("it was given no time")
		}
		time.Sleep(6 * time.Second)
		if !slow.over() {
			t.Error("who takes nothing has a stream still")
		}
		s.Drain()
	})
}

// A list that changes by itself is told of, too.
func TestEventsVarying(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := listServer(t, `package permissions

catalog := {"x": ["late"]}

allow if time.now_ns() > data.noon
-- data.json --
{"noon": `+strconv.FormatInt(time.Now().Add(time.Minute).UnixNano(), 10)+`}
`, usersConfig("{package: permissions}", "ada"), httpserve.Config{}, nil)
		l := s.listen(t, tokenOf("ada"))
		l.events()
		time.Sleep(time.Minute)
		if got := l.events(); len(got) != 0 {
			t.Errorf("got %+v before noon", got)
		}
		time.Sleep(21 * time.Second)
		if got := l.events(); len(got) != 1 {
			t.Errorf("got %+v after noon, want the new version", got)
		}
		s.Drain()
	})
}

// Over a real connection: each event leaves at once, and a client that goes is
// noticed.
func TestEventsConnection(t *testing.T) {
	s := listServer(t, fmt.Sprintf(versions, 2), usersConfig("{package: permissions}", "ada"), httpserve.Config{}, nil)
	web := httptest.NewServer(s)
	defer web.Close()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	req, err := http.NewRequestWithContext(ctx, "GET", web.URL+"/t/orders/v1/me/permissions/events", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+tokenOf("ada"))
	resp, err := web.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	next := func(prefix string) string {
		for lines.Scan() {
			if strings.HasPrefix(lines.Text(), prefix) {
				return lines.Text()
			}
		}
		t.Fatalf("no line with %q: %v", prefix, lines.Err())
		return ""
	}
	first := next("data:")
	start := time.Now()
	s.update(t, fmt.Sprintf(versions, 4))
	if second := next("data:"); second == first || time.Since(start) > 2*time.Second {
		t.Errorf("got %s after %s, %s", second, first, time.Since(start))
	}
	stop()
	_, _ = io.Copy(io.Discard, resp.Body)
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, _, streams := s.Remembered(); streams == 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatal("a stream is left whose client is gone")
		}
	}
}

// A policy that begins to tell the tokens of one subject apart has their streams
// opened anew: what was one list may be two.
func TestEventsTokens(t *testing.T) {
	const bundle = `package permissions

catalog := {"x": ["a"]}

allow if input.subject.claims.%s == "1"
`
	synctest.Test(t, func(t *testing.T) {
		s := listServer(t, fmt.Sprintf(bundle, "role"), jwtUsers, httpserve.Config{}, nil)
		one, two := s.listen(t, token(t, "jti", `"1"`)), s.listen(t, token(t, "jti", `"2"`))
		if _, n, streams := s.Remembered(); n != 1 || streams != 2 {
			t.Errorf("got %d lists and %d streams, want one list for both", n, streams)
		}
		s.update(t, fmt.Sprintf(bundle, "jti"))
		synctest.Wait()
		if !one.over() || !two.over() {
			t.Error("streams go on")
		}
		one, two = s.listen(t, token(t, "jti", `"1"`)), s.listen(t, token(t, "jti", `"2"`))
		if a, b := one.events(), two.events(); len(a) != 1 || len(b) != 1 || a[0].text == b[0].text {
			t.Errorf("got %+v and %+v, want two lists", a, b)
		}
		s.Drain()
	})
}

// All at once, with less memory than it takes: what is counted stays right, and
// nothing is left at the end.
func TestListsTogether(t *testing.T) {
	users := make([]string, 40)
	for i := range users {
		users[i] = fmt.Sprintf("user%d", i)
	}
	s := listServer(t, fmt.Sprintf(versions, 0), usersConfig("{package: permissions, memory_bytes: 60000, streams: 20}", users...),
		httpserve.Config{ListMemory: 50_000}, nil)
	s.get(tokenOf(users[0]))
	ctx, stop := context.WithTimeout(t.Context(), time.Second)
	defer stop()
	var work sync.WaitGroup
	work.Go(func() {
		for version := 1; ctx.Err() == nil; version++ {
			s.update(t, fmt.Sprintf(versions, version))
			time.Sleep(50 * time.Millisecond)
		}
	})
	for range 4 {
		work.Go(func() {
			for ctx.Err() == nil {
				if w := s.get(tokenOf(users[rand.IntN(len(users))]), "X-Request-Timeout", fmt.Sprint(rand.Float64()/50)); w.Code != 200 && w.Code != 503 {
					t.Errorf("got %d, %s", w.Code, w.Body)
				}
				s.Remembered() // panics where the books are wrong
			}
		})
		work.Go(func() {
			for ctx.Err() == nil {
				short, end := context.WithTimeout(ctx, rand.N(50*time.Millisecond))
				r := httptest.NewRequestWithContext(short, "GET", "http://localhost/t/orders/v1/me/permissions/events", nil)
				r.Header.Set("Authorization", "Bearer "+tokenOf(users[rand.IntN(len(users))]))
				s.ServeHTTP(&listener{header: http.Header{}}, r)
				end()
			}
		})
	}
	work.Wait()
	if _, _, streams := s.Remembered(); streams != 0 {
		t.Errorf("got %d streams, want none", streams)
	}
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) { // what was being computed ends
		s.Forget()
		bytes, lists, _ := s.Remembered()
		if bytes == 0 && lists == 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("got %d bytes and %d lists of nobody", bytes, lists)
		}
	}
}
