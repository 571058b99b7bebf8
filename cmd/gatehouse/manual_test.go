package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/open-policy-agent/opa/v1/plugins/rest"
	"go.yaml.in/yaml/v3"

	"github.com/gatehouse-authz/gatehouse/control"
)

// docs/configuration.md is written by hand but for the parts between two marks,
// which are made of the structs and comments that the file is read into:
//
//	go test ./cmd/gatehouse -run TestManual -update      (make docs)
const (
	manualPath = "../../docs/configuration.md"
	modulePath = "github.com/gatehouse-authz/gatehouse"
)

// The generated parts of the manual are what the code says.
func TestManual(t *testing.T) {
	was, err := os.ReadFile(manualPath)
	if err != nil {
		t.Fatal(err)
	}
	text := string(was)
	for name, part := range map[string]string{"file": manualOfFile(t), "credentials": manualOfCredentials()} {
		begin, end := "<!-- generated: "+name+" -->\n", "<!-- end: "+name+" -->"
		before, rest, ok := strings.Cut(text, begin)
		_, after, ok2 := strings.Cut(rest, end)
		if !ok || !ok2 {
			t.Fatalf("%s has not both %q and %q", manualPath, begin, end)
		}
		text = before + begin + part + end + after
	}
	if text == string(was) {
		return
	}
	if *update {
		if err := os.WriteFile(manualPath, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Errorf("docs/configuration.md is not what the code says: make docs\n%s", firstDifference(string(was), text))
}

func firstDifference(got, want string) string {
	g, w := strings.Split(got, "\n"), strings.Split(want, "\n")
	for i := range min(len(g), len(w)) {
		if g[i] != w[i] {
			return fmt.Sprintf("line %d: got\n%s\nwant\n%s", i+1, g[i], w[i])
		}
	}
	return "one is longer"
}

// source is what the comments of a package say.
type source struct {
	types  map[string]string            // :: type → its comment
	fields map[string]map[string]string // :: type → field → its comment
}

var sources = map[string]*source{} // :: import path → its comments

// sourceOf reads the comments of a package of this module.
func sourceOf(t *testing.T, pkg string) *source {
	t.Helper()
	if s := sources[pkg]; s != nil {
		return s
	}
	dir := "."
	if rel, ok := strings.CutPrefix(pkg, modulePath+"/"); ok && rel != "cmd/gatehouse" {
		dir = filepath.Join("../..", rel)
	}
	names, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil || len(names) == 0 {
		t.Fatalf("no Go files of %s in %s: %v", pkg, dir, err)
	}
	s := &source{map[string]string{}, map[string]map[string]string{}}
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		for _, decl := range file.Decls {
			gen, ok := decl.(*ast.GenDecl)
			if !ok {
				continue
			}
			for _, spec := range gen.Specs {
				typ, ok := spec.(*ast.TypeSpec)
				if !ok {
					continue
				}
				s.types[typ.Name.Name] = oneLine(gen.Doc.Text())
				st, ok := typ.Type.(*ast.StructType)
				if !ok {
					continue
				}
				fields, above := map[string]string{}, ""
				for _, f := range st.Fields.List {
					if doc := oneLine(f.Doc.Text()); doc != "" {
						above = doc
					}
					for _, n := range f.Names { // one without a comment shares that above it
						fields[n.Name] = above
					}
				}
				s.fields[typ.Name.Name] = fields
			}
		}
	}
	sources[pkg] = s
	return s
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }

// key is one key of the file.
type key struct{ path, kind, def, text string }

// manualOfFile documents the keys of Config, a table for each key at the top.
func manualOfFile(t *testing.T) string {
	var b strings.Builder
	typ, defaults := reflect.TypeFor[Config](), reflect.ValueOf(defaultConfig()).Elem()
	docs := sourceOf(t, typ.PkgPath()).fields[typ.Name()]
	for i := range typ.NumField() {
		f := typ.Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		fmt.Fprintf(&b, "\n### `%s`\n\n", name)
		var keys []key
		if f.Type.Kind() == reflect.Struct && f.Type != reflect.TypeFor[yaml.Node]() {
			fmt.Fprintf(&b, "%s\n\n", renamed(docs[f.Name], f, typ))
			keys = manualKeys(t, name, f.Type, defaults.Field(i))
		} else {
			keys = []key{keyOf(t, name, f, typ, defaults.Field(i), docs[f.Name])}
		}
		b.WriteString("| key | value | default | |\n|---|---|---|---|\n")
		for _, k := range keys {
			fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", k.path, k.kind, k.def, k.text)
		}
	}
	b.WriteString("\n### What `overrides` may change\n\nFor one tenant, beside `opa`: ")
	var own []string
	own = append(own, ownKeys("", reflect.TypeFor[TenantKeys]())...)
	fmt.Fprintf(&b, "`%s`.\n\n", strings.Join(own, "`, `"))
	return b.String()
}

// ownKeys are the paths of the keys that a tenant may have of its own.
func ownKeys(prefix string, typ reflect.Type) (paths []string) {
	for i := range typ.NumField() {
		f := typ.Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		if name = prefix + name; f.Type.Kind() == reflect.Struct {
			paths = append(paths, ownKeys(name+".", f.Type)...)
		} else {
			paths = append(paths, name)
		}
	}
	return paths
}

// manualKeys are the keys of a struct whose value is that of an empty file.
func manualKeys(t *testing.T, prefix string, typ reflect.Type, value reflect.Value) (keys []key) {
	t.Helper()
	return keysIn(t, prefix, typ, value, "")
}

// keysIn is manualKeys for a struct whose fields have the comment above where
// they have none of their own.
func keysIn(t *testing.T, prefix string, typ reflect.Type, value reflect.Value, above string) (keys []key) {
	t.Helper()
	src := &source{}
	if typ.Name() != "" {
		src = sourceOf(t, typ.PkgPath())
	}
	for i := range typ.NumField() {
		f := typ.Field(i)
		name, option, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		if option == "inline" {
			keys = append(keys, manualKeys(t, prefix, f.Type, value.Field(i))...)
			continue
		}
		if name == "" || name == "-" {
			continue
		}
		path, doc := prefix+"."+name, src.fields[typ.Name()][f.Name]
		elem, v := f.Type, value.Field(i)
		if elem.Kind() == reflect.Slice && elem.Elem().Kind() == reflect.Struct {
			keys = append(keys, keyOf(t, path, f, typ, v, doc))
			elem, path = elem.Elem(), path+"[]"
			v = reflect.Zero(elem)
		}
		if elem.Kind() == reflect.Pointer {
			elem = elem.Elem()
			v = reflect.Zero(elem)
			keys = append(keys, keyOf(t, path, f, typ, v, doc))
		}
		if elem.Kind() == reflect.Struct && elem != reflect.TypeFor[yaml.Node]() {
			under := ""
			if elem.Name() == "" {
				if under = doc; under == "" {
					under = above
				}
				if under == "" {
					under = src.types[typ.Name()]
				}
			}
			keys = append(keys, keysIn(t, path, elem, v, under)...)
			continue
		}
		for _, other := range []string{src.types[typ.Name()], above} {
			if doc == "" {
				doc = other
			}
		}
		if doc == "" {
			t.Errorf("%s has no comment", path)
		}
		keys = append(keys, keyOf(t, path, f, typ, v, doc))
	}
	return keys
}

// defaultOf is the sentence of a comment that says the default; the rest of one is
// marked where it begins with a value.
var (
	defaultOf  = regexp.MustCompile(`(?:^|\s)Default:? (.*?)\.(?:\s|$)`)
	valueFirst = regexp.MustCompile(`^(""|\{\}|[0-9]+s?|deny|[a-z]+/[a-z/]+)(: |$)`)
)

// keyOf documents a key, a field of the struct in. Where an empty file gives it a
// value, the comment must say the same.
func keyOf(t *testing.T, path string, f reflect.StructField, in reflect.Type, value reflect.Value, doc string) key {
	t.Helper()
	k := key{path: path, kind: kindOf(f.Type)}
	said, from := "", 0
	if strings.HasPrefix(doc, "Default is ") { // the name of a field
		from = len("Default")
	}
	if m := defaultOf.FindStringSubmatchIndex(doc[from:]); m != nil {
		said = doc[from+m[2] : from+m[3]]
		doc = strings.TrimSpace(doc[:from+m[0]] + " " + doc[from+m[1]:])
	}
	is := printed(value)
	switch rest, same := afterValue(said, value); {
	case is == "":
		k.def = valueFirst.ReplaceAllString(renamed(said, f, in), "`$1`$2")
	case said == "":
		k.def = "`" + is + "`"
	case same:
		k.def = "`" + is + "`" + escaped(rest)
	default:
		t.Errorf("%s: the comment says that the default is %q, and it is %q", path, said, is)
	}
	k.text = renamed(doc, f, in)
	return k
}

// afterValue reports whether a text begins with a value, and returns what follows.
func afterValue(said string, v reflect.Value) (rest string, same bool) {
	forms := []string{printed(v)}
	if v.Kind() == reflect.String {
		forms = append(forms, v.String())
	}
	word := said
	if i := strings.IndexAny(said, " ,;:"); i >= 0 {
		word = said[:i]
	}
	if d, err := time.ParseDuration(word); err == nil && v.CanInt() && v.Int() == int64(d) { // 60s is 1m
		return said[len(word):], true
	}
	for _, form := range forms {
		if rest, ok := strings.CutPrefix(said, form); ok && form != "" && (rest == "" || strings.ContainsAny(rest[:1], " ,;:")) {
			return rest, true
		}
	}
	return "", false
}

// firstWords are the names with which a comment begins.
var firstWords = regexp.MustCompile(`^[A-Z]\w*( and [A-Z]\w*)?`)

// renamed is a comment, for a cell of a table, in which fields have the names that
// they have in the file.
func renamed(doc string, f reflect.StructField, in reflect.Type) string {
	names := map[string]string{}
	for i := range in.NumField() {
		name, _, _ := strings.Cut(in.Field(i).Tag.Get("yaml"), ",")
		names[in.Field(i).Name] = "`" + name + "`"
	}
	doc = escaped(doc)
	first := firstWords.FindString(doc)
	rest := doc[len(first):]
	if after := strings.TrimSpace(rest); first == in.Name() && names[first] == "" && after != "" {
		return strings.ToUpper(after[:1]) + after[1:] // the comment of the struct
	}
	word := regexp.MustCompile(`\w+`)
	first = word.ReplaceAllStringFunc(first, func(w string) string {
		if name := names[w]; name != "" {
			return name
		}
		return w
	})
	rest = word.ReplaceAllStringFunc(rest, func(w string) string {
		if name := names[w]; name != "" && strings.ToLower(w[1:]) != w[1:] && w != strings.ToUpper(w) {
			return name
		}
		return w
	})
	return first + rest
}

// printed is a value as the file would have it; "": the zero value.
func printed(v reflect.Value) string {
	if v.IsZero() {
		if v.Kind() == reflect.Bool {
			return "false"
		}
		return ""
	}
	switch x := v.Interface().(type) {
	case Size:
		for _, u := range []struct {
			name  string
			bytes Size
		}{{"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}} {
			if x%u.bytes == 0 {
				return strconv.FormatInt(int64(x/u.bytes), 10) + u.name
			}
		}
		return strconv.FormatInt(int64(x), 10)
	case Duration:
		return short(time.Duration(x))
	case Delay:
		return short(time.Duration(x))
	}
	switch v.Kind() {
	case reflect.String:
		if s := v.String(); strings.Trim(s, "abcdefghijklmnopqrstuvwxyz_") == "" {
			return s
		}
		return strconv.Quote(v.String())
	case reflect.Slice, reflect.Map, reflect.Struct:
		n := &yaml.Node{}
		if err := n.Encode(v.Interface()); err != nil {
			panic(err) // a value of the defaults
		}
		return flow(n)
	}
	return fmt.Sprint(v.Interface())
}

// flow is a node in one line.
func flow(n *yaml.Node) string {
	var parts []string
	switch n.Kind {
	case yaml.SequenceNode:
		for _, c := range n.Content {
			parts = append(parts, flow(c))
		}
		return "[" + strings.Join(parts, ", ") + "]"
	case yaml.MappingNode:
		for i := 0; i+1 < len(n.Content); i += 2 {
			parts = append(parts, n.Content[i].Value+": "+flow(n.Content[i+1]))
		}
		return "{" + strings.Join(parts, ", ") + "}"
	}
	return n.Value
}

// short is a duration without units of zero: 5m, not 5m0s.
func short(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// kindOf names what a key takes.
func kindOf(typ reflect.Type) string {
	switch typ {
	case reflect.TypeFor[Size]():
		return "size"
	case reflect.TypeFor[Duration](), reflect.TypeFor[Delay]():
		return "duration"
	case reflect.TypeFor[OnError]():
		return "word"
	case reflect.TypeFor[yaml.Node]():
		return "mapping"
	}
	switch typ.Kind() {
	case reflect.Bool:
		return "true, false"
	case reflect.String:
		return "string"
	case reflect.Slice:
		return "list"
	case reflect.Map, reflect.Struct:
		return "mapping"
	}
	return "number"
}

// escaped is a text for a cell of a table.
func escaped(s string) string {
	return strings.NewReplacer("|", `\|`, "<", "&lt;", "*", `\*`).Replace(s)
}

// manualOfCredentials lists the keys of a service that OPA's own code reads.
func manualOfCredentials() string {
	var b strings.Builder
	b.WriteString("\n| key | value |\n|---|---|\n")
	for _, k := range credentialKeys() {
		fmt.Fprintf(&b, "| `%s` | %s |\n", k.path, k.kind)
	}
	b.WriteString("\n")
	return b.String()
}

// credentialKeys are the keys tls and credentials of OPA's rest.Config, as far as
// Gatehouse accepts them.
func credentialKeys() (keys []key) {
	var walk func(prefix string, typ reflect.Type, above []reflect.Type)
	walk = func(prefix string, typ reflect.Type, above []reflect.Type) {
		if slices.Contains(above, typ) {
			keys = append(keys, key{path: prefix, kind: "as above"})
			return
		}
		above = append(slices.Clone(above), typ)
		for i := range typ.NumField() {
			f := typ.Field(i)
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			if !f.IsExported() || name == "" || name == "-" {
				continue
			}
			path, ft := prefix+"."+name, f.Type
			if ft.Kind() == reflect.Pointer {
				ft = ft.Elem()
			}
			if ft.Kind() == reflect.Struct {
				walk(path, ft, above)
				continue
			}
			keys = append(keys, key{path: path, kind: kindOf(ft)})
		}
	}
	typ := reflect.TypeFor[rest.Config]()
	for _, name := range []string{"TLS", "Credentials"} {
		f, _ := typ.FieldByName(name)
		ft := f.Type
		if ft.Kind() == reflect.Pointer {
			ft = ft.Elem()
		}
		tag, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		walk("services.*."+tag, ft, nil)
	}
	return slices.DeleteFunc(keys, func(k key) bool { return k.path == "services.*.credentials.plugin" })
}

// The part of the manual about opa: names the keys that control reads, and
// control reads those that it names as the manual says.
func TestManualOPA(t *testing.T) {
	text, err := os.ReadFile(manualPath)
	if err != nil {
		t.Fatal(err)
	}
	_, part, ok := strings.Cut(string(text), "\n## The `opa` block\n")
	if !ok {
		t.Fatalf("%s has no part about the opa block", manualPath)
	}
	accepted, part, ok := strings.Cut(part, "\n### Accepted without effect\n")
	if !ok {
		t.Fatal("no part about keys without effect")
	}
	noted, refused, ok := strings.Cut(part, "\n### Refused\n")
	if !ok {
		t.Fatal("no part about keys that are refused")
	}

	known := map[string]bool{}
	check := func(part, name string, good func(faults, notes []string) bool) {
		t.Helper()
		paths := pathsIn(part)
		if len(paths) < 5 {
			t.Errorf("the part about keys that are %s names %d", name, len(paths))
		}
		for _, path := range paths {
			for _, k := range strings.Split(strings.ReplaceAll(path, "[]", ""), ".") {
				known[k] = true
			}
			if faults, notes := about(path); !good(faults, notes) {
				t.Errorf("%s is not %s: got faults %q, notes %q", path, name, faults, notes)
			}
		}
	}
	unknown := func(faults []string) bool {
		return slices.ContainsFunc(faults, func(f string) bool {
			return strings.Contains(f, "unknown or unsupported key") || strings.HasPrefix(f, "not supported: ") && !strings.Contains(f, `"1"`)
		})
	}
	check(accepted, "accepted", func(faults, notes []string) bool { return !unknown(faults) })
	check(noted, "noted", func(faults, notes []string) bool { return !unknown(faults) && len(notes) > 0 })
	check(refused, "refused", func(faults, _ []string) bool { return len(faults) > 0 })

	for name, places := range keysReadBy(t, "../../control") {
		if !known[name] && !known[strings.ReplaceAll(name, ".", "/")] {
			t.Errorf("the manual does not name %q, which is read in %s", name, strings.Join(places, ", "))
		}
	}
}

// rowOf matches the first cell of a row, which names one key or several.
var rowOf = regexp.MustCompile("(?m)^\\| (`[^|]*`) \\|")

// pathsIn are the keys of the tables in a text.
func pathsIn(text string) (paths []string) {
	for _, m := range rowOf.FindAllStringSubmatch(text, -1) {
		for _, path := range strings.Split(m[1], ", ") {
			paths = append(paths, strings.Trim(path, "`"))
		}
	}
	return paths
}

// about returns what control says of a key, in a configuration that is fine
// without it.
func about(path string) (faults, notes []string) {
	block := map[string]any{
		"services": map[string]any{"x": map[string]any{"url": "https://example.com"}},
		"bundles":  map[string]any{"x": map[string]any{"service": "x"}},
	}
	at := strings.NewReplacer("*", "x", "plugins.envoy.ext_authz.grpc", "plugins.envoy/ext_authz/grpc").Replace(path)
	keys := strings.Split(at, ".")
	m, place := block, ""
	for i, k := range keys {
		k = strings.ReplaceAll(k, "/", ".")
		list := strings.HasSuffix(k, "[]")
		k = strings.TrimSuffix(k, "[]")
		place = strings.TrimPrefix(place+"."+k, ".")
		if list {
			place += "[0]"
		}
		switch {
		case i == len(keys)-1 && list:
			m[k] = []any{"1"}
		case i == len(keys)-1:
			if _, there := m[k]; !there {
				m[k] = valueOf(path)
			}
		default:
			child, _ := m[k].(map[string]any)
			if child == nil {
				child = map[string]any{}
			}
			if m[k] = child; list {
				m[k] = []any{child}
			}
			m = child
		}
	}
	_, noted, err := control.Parse(block, control.Options{})
	of := func(fs []control.Fault) (texts []string) {
		for _, f := range fs {
			if f.Path == place || strings.HasPrefix(place, f.Path+".") && strings.Contains(f.Text, "not supported") {
				texts = append(texts, f.Text)
			}
		}
		return texts
	}
	var all control.Faults
	if err != nil {
		all = err.(control.Faults)
	}
	return of(all), of(noted)
}

// valueOf is a value for a key of which not every value is taken the same.
func valueOf(path string) any {
	switch path {
	case "status.prometheus", "bundles.*.persist", "services.*.allow_insecure_tls", "bundles.*.signing.allow_unsigned_delta_bundles":
		return true
	case "discovery", "bundle", "decision_log":
		return map[string]any{"name": "x"}
	case "keys.*.private_key":
		return "pem"
	case "bundles.*.resource":
		return "1"
	}
	return "1"
}

// keysReadBy are the keys that a package reads from a mapping, each with the
// files in which it does.
func keysReadBy(t *testing.T, dir string) map[string][]string {
	t.Helper()
	readers := []string{"string", "bool", "number", "count", "seconds", "float", "strings", "items", "list", "objects", "object", "has", "value"}
	keys := map[string][]string{}
	names, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil || len(names) == 0 {
		t.Fatalf("no Go files in %s: %v", dir, err)
	}
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		add := func(e ast.Expr) {
			if lit, ok := e.(*ast.BasicLit); ok && lit.Kind == token.STRING {
				k, _ := strconv.Unquote(lit.Value)
				keys[k] = append(keys[k], filepath.Base(name))
			}
		}
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.CallExpr:
				sel, ok := n.Fun.(*ast.SelectorExpr)
				switch {
				case !ok || len(n.Args) == 0:
				case slices.Contains(readers, sel.Sel.Name):
					add(n.Args[0])
				case sel.Sel.Name == "entryIn" && len(n.Args) > 1:
					add(n.Args[1])
				}
			case *ast.RangeStmt: // for _, key := range []string{...}
				if id, ok := n.Value.(*ast.Ident); ok && id.Name == "key" {
					if lit, ok := n.X.(*ast.CompositeLit); ok {
						for _, e := range lit.Elts {
							add(e)
						}
					}
				}
			}
			return true
		})
	}
	delete(keys, "")
	if len(keys) < 50 {
		t.Fatalf("got %d keys of %s: the way in which it reads them has changed", len(keys), dir)
	}
	return keys
}

// What docs/ shows of Rego, JSON and YAML is quoted from files that tests run or
// read: those of docs/examples and deploy/envoy. How it is indented does not
// matter.
func TestQuoted(t *testing.T) {
	tidy := func(s string) string { return strings.Join(strings.Fields(s), " ") }
	var files []string
	for _, root := range []string{"../../docs/examples", "../../deploy/envoy"} {
		err := filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			text, err := os.ReadFile(path)
			files = append(files, tidy(string(text)))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	quoted := 0
	for _, name := range []string{"policies.md", "quickstart.md", "migration.md", "security.md", "scale.md"} {
		doc, err := os.ReadFile("../../docs/" + name)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile("(?ms)^ *```(rego|json|yaml)\n(.*?)^ *```$").FindAllStringSubmatch(string(doc), -1) {
			quoted++
			if text := tidy(m[2]); !slices.ContainsFunc(files, func(file string) bool { return strings.Contains(file, text) }) {
				t.Errorf("docs/%s shows what no file of docs/examples or deploy/envoy has:\n%s", name, m[2])
			}
		}
	}
	if quoted < 10 {
		t.Errorf("got %d quotations", quoted)
	}
}

// The files for gatehouse in docs/examples are such that load reads them.
func TestExampleFiles(t *testing.T) {
	names, err := filepath.Glob("../../docs/examples/gatehouse*.yaml")
	if err != nil || len(names) == 0 {
		t.Fatalf("no files: %v", err)
	}
	token := filepath.Join(t.TempDir(), "token")
	t.Setenv("AWS_WEB_IDENTITY_TOKEN_FILE", token) // as a pod has them
	t.Setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/gatehouse")
	if err := os.WriteFile(token, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := load(writeFile(t, string(text)), "", true); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Regression: a file whose bundles are discovered, or stand in one line with all of
// opa, was taken for one that leaves them to a directory.
func TestBundlesAreNamed(t *testing.T) {
	for _, text := range []string{
		`opa: {services: {s: {url: "https://example.com"}}, bundles: {policy: {service: s}}}`,
		`opa: {services: {s: {url: "https://example.com"}}, discovery: {service: s, resource: d}}`,
		"opa:\n  services: {s: {url: \"https://example.com\"}}\n  discovery: {service: s, resource: d}\n",
	} {
		if _, err := load(writeFile(t, text), "", true); err != nil {
			t.Errorf("%s: %v", text, err)
		}
	}
}

var (
	goTest      = regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)\w+)\(`)
	jsTest      = regexp.MustCompile(`(?m)^\s*test\("([^"]+)"`)
	namedTest   = regexp.MustCompile("`([a-z0-9]+\\.(?:Test|Fuzz)\\w+)`")
	quotedTitle = regexp.MustCompile(`"([^"]+)"`)
)

// testsOf are the tests of the repository: package.Test for those in Go, and the
// titles of those in JavaScript.
func testsOf(t *testing.T) map[string]bool {
	t.Helper()
	tests := map[string]bool{}
	err := filepath.WalkDir("../..", func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := d.Name()
		if d.IsDir() {
			if name == "node_modules" || len(name) > 2 && name[0] == '.' && name[1] != '.' {
				return filepath.SkipDir
			}
			return nil
		}
		find, prefix := goTest, filepath.Base(filepath.Dir(path))+"."
		switch {
		case strings.HasSuffix(name, ".test.ts"), strings.HasSuffix(name, ".test.mjs"):
			find, prefix = jsTest, ""
		case !strings.HasSuffix(name, "_test.go"):
			return nil
		}
		text, err := os.ReadFile(path)
		for _, m := range find.FindAllStringSubmatch(string(text), -1) {
			tests[prefix+m[1]] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return tests
}

// Each test that the documentation names is one of the repository, and each row of
// docs/compatibility.md names one or says that it was not run.
func TestProofs(t *testing.T) {
	tests := testsOf(t)
	if !tests["gatehouse.TestProofs"] || !tests["an ability of CASL says what the list says"] {
		t.Fatal("the tests of the repository are not found")
	}
	docs, err := filepath.Glob("../../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range append(docs, "../../SECURITY.md") {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range namedTest.FindAllStringSubmatch(string(text), -1) {
			if !tests[m[1]] {
				t.Errorf("%s names %s, which is no test", filepath.Base(path), m[1])
			}
		}
	}

	text, err := os.ReadFile("../../docs/compatibility.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := 0
	for line := range strings.Lines(string(text)) {
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		proof := strings.TrimSpace(cells[len(cells)-1])
		if !strings.HasPrefix(line, "|") || proof == "proved by" || strings.HasPrefix(proof, "---") {
			continue
		}
		rows++
		if proof == "not run" || proof == "all" {
			continue
		}
		names := len(namedTest.FindAllString(proof, -1))
		for _, m := range quotedTitle.FindAllStringSubmatch(proof, -1) {
			names++
			if !tests[m[1]] {
				t.Errorf("docs/compatibility.md names %q, which is no test", m[1])
			}
		}
		if names == 0 {
			t.Errorf("docs/compatibility.md has a row without a proof: %s", line)
		}
	}
	if rows < 40 {
		t.Errorf("got %d rows", rows)
	}
}

var (
	link    = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	heading = regexp.MustCompile(`(?m)^#+ (.*)$`)
	fenced  = regexp.MustCompile("(?ms)^ *```.*?^ *```$")
	slugged = regexp.MustCompile(`[^\p{L}\p{N} _-]`)
)

// Each page of docs is in its index, and what a page links to is there, down to the
// heading.
func TestLinks(t *testing.T) {
	pages, err := filepath.Glob("../../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	index, err := os.ReadFile("../../docs/README.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range pages {
		if name := filepath.Base(path); name != "README.md" && !strings.Contains(string(index), "]("+name+")") {
			t.Errorf("docs/README.md does not name %s", name)
		}
	}
	anchors := func(path string) map[string]bool {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		found := map[string]bool{}
		for _, m := range heading.FindAllStringSubmatch(fenced.ReplaceAllString(string(text), ""), -1) {
			found[strings.ReplaceAll(slugged.ReplaceAllString(strings.ToLower(m[1]), ""), " ", "-")] = true
		}
		return found
	}
	root, err := filepath.Glob("../../*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range append(pages, root...) {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range link.FindAllStringSubmatch(fenced.ReplaceAllString(string(text), ""), -1) {
			target, anchor, _ := strings.Cut(m[1], "#")
			if strings.Contains(target, "://") {
				continue
			}
			file := path
			if target != "" {
				file = filepath.Join(filepath.Dir(path), target)
			}
			if _, err := os.Stat(file); err != nil {
				t.Errorf("%s links to %s, which is not there", path, m[1])
				continue
			}
			if anchor != "" && !anchors(file)[anchor] {
				t.Errorf("%s links to %s, and %s has no such heading", path, m[1], file)
			}
		}
	}
}
