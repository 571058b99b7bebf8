package control

import (
	"encoding/json"
	"fmt"
	"reflect"
	"sync"
	"testing"
)

// Tenants share what of a configuration is no template, and its templates once they
// are parsed: reading them, any number at once, changes neither.
func TestTenantsShareTheBlock(t *testing.T) {
	text := []byte(`{
		"labels": {"app": "{{ .tenant }}", "region": "eu"},
		"services": {
			"plain": {"url": "https://plain.example.com", "headers": {"x-a": "b"}, "credentials": {"bearer": {"token": "t"}}},
			"own": {"url": "https://{{ .tenant }}.example.com", "credentials": {"oauth2": {"token_url": "https://x", "client_id": "{{ .tenant }}", "client_secret": "x"}}}},
		"keys": {"k": {"algorithm": "HS256", "key": "secret"}},
		"bundles": {"policy": {"service": "own", "resource": "{{ .tenant }}/x.tar.gz", "signing": {"keyid": "k"}}, "shared": {"service": "plain", "signing": {"keyid": "k"}}},
		"plugins": {"gatehouse_http": {"data": ["a/{{ .tenant }}", "b/c"]}},
		"decision_logs": {"service": "plain", "reporting": {"min_delay_seconds": 5, "max_delay_seconds": 10}},
		"status": {"service": "own"}
	}`)
	read := func() (block map[string]any) {
		if err := json.Unmarshal(text, &block); err != nil {
			t.Fatal(err)
		}
		return block
	}
	template, _, err := Parse(read(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 64 {
		wg.Go(func() {
			name := fmt.Sprint("tenant-", i)
			got, err := template.Tenant(name)
			if err != nil {
				t.Error(err)
				return
			}
			alone, _, err := Parse(read(), Options{})
			if err != nil {
				t.Error(err)
				return
			}
			want, err := alone.Tenant(name)
			if err != nil {
				t.Error(err)
				return
			}
			if got.Labels["app"] != name || got.Labels["region"] != "eu" || got.Bundles[0].Resource != name+"/x.tar.gz" ||
				!reflect.DeepEqual(got.Labels, want.Labels) || got.Bundles[0].Service != want.Bundles[0].Service || got.Bundles[1].Service != want.Bundles[1].Service ||
				!got.Log.Equal(want.Log) || !got.Status.Equal(want.Status) || got.HTTP.Identity() != want.HTTP.Identity() {
				t.Errorf("%s: got %+v, want %+v", name, got, want)
			}
		})
	}
	wg.Wait()
	if !reflect.DeepEqual(template.block, read()) {
		t.Errorf("it has changed: %v", template.block)
	}
}

func BenchmarkTenant(b *testing.B) {
	template, _, err := Parse(map[string]any{
		"services":      map[string]any{"control": map[string]any{"url": "https://control.example.com"}},
		"labels":        map[string]any{"app": "{{ .tenant }}"},
		"bundles":       map[string]any{"policy": map[string]any{"service": "control", "resource": "shared.tar.gz"}},
		"status":        map[string]any{"service": "control"},
		"decision_logs": map[string]any{"service": "control"},
	}, Options{})
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := template.Tenant("orders"); err != nil {
			b.Fatal(err)
		}
	}
}
