package main

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// override reads what the file says of one tenant, at path.
func (l *loader) override(path, name string, node *yaml.Node, block map[string]any) {
	id := l.tenantID(path, name)
	override := Override{TenantKeys: l.Config.Tenants.TenantKeys}
	override.AllowHeaders = slices.Clone(override.AllowHeaders)
	if err := decodeStrict(node, &override); err != nil {
		l.yaml(err)
		return
	}
	l.tenantKeys(path, &override.TenantKeys)
	merged := mergeMaps(named(block), named(l.block(join(path, "opa"), &override.OPA)))
	l.overrides[id] = l.set(join(path, "opa"), merged, override.TenantKeys)
}

// maxOverrides bounds the files of overrides_dir.
const maxOverrides = 100_000

// overridesDir reads the files of overrides_dir, each of which is a tenant's.
func (l *loader) overridesDir(block map[string]any) {
	if l.OverridesDir == "" {
		return
	}
	files, err := os.ReadDir(l.OverridesDir)
	if err != nil {
		l.fault("overrides_dir", "%s", err)
		return
	}
	if len(files) > maxOverrides {
		l.fault("overrides_dir", "has %d files, limit %d", len(files), maxOverrides)
		return
	}
	for _, file := range files {
		name, ok := strings.CutSuffix(file.Name(), ".yaml")
		if !ok || strings.HasPrefix(name, ".") {
			continue
		}
		if _, ok := l.Overrides[name]; ok {
			l.fault("overrides."+name, "stands in %s too", filepath.Join(l.OverridesDir, file.Name()))
		}
		one := &loader{Loaded: l.Loaded}
		one.faults.file = filepath.Join(l.OverridesDir, file.Name())
		text, err := readBounded(one.faults.file)
		if err != nil {
			one.fault("", "%s", err)
		} else if err := yaml.Unmarshal(text, &one.root); err != nil {
			one.yaml(err)
		} else if one.places.root = &one.root; len(one.root.Content) > 0 {
			one.override("", name, one.root.Content[0], block)
		}
		l.others = append(l.others, one.faults)
	}
}

// decodeStrict decodes n over what into already holds. Unknown keys are errors:
// a node's own decoder passes them over.
func decodeStrict(n *yaml.Node, into *Override) error {
	errs := unknownKeys(n, reflect.TypeFor[Override]())
	var typeError *yaml.TypeError
	if err := n.Decode(into); errors.As(err, &typeError) {
		errs = append(errs, typeError.Errors...)
	} else if err != nil {
		return err
	}
	if len(errs) > 0 {
		return &yaml.TypeError{Errors: errs}
	}
	return nil
}

// unknownKeys returns an error for each key in n that is no field of t.
func unknownKeys(n *yaml.Node, t reflect.Type) (errs []string) {
	for n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	if n.Kind != yaml.MappingNode || t.Kind() != reflect.Struct || t == reflect.TypeFor[yaml.Node]() {
		return nil
	}
	known := map[string]reflect.Type{}
	var collect func(reflect.Type)
	collect = func(t reflect.Type) {
		for i := range t.NumField() {
			f := t.Field(i)
			name, option, _ := strings.Cut(f.Tag.Get("yaml"), ",")
			if option == "inline" {
				collect(f.Type)
			} else {
				known[name] = f.Type
			}
		}
	}
	collect(t)
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		field, ok := known[key.Value]
		if !ok {
			errs = append(errs, fmt.Sprintf("line %d: unknown key %q", key.Line, key.Value))
			continue
		}
		errs = append(errs, unknownKeys(value, field)...)
	}
	return errs
}

// named returns an OPA configuration whose services stand in a map by name,
// also where they were listed, so that an override of one is merged with it.
func named(block map[string]any) map[string]any {
	list, ok := block["services"].([]any)
	if !ok {
		return block
	}
	services := map[string]any{}
	for _, v := range list {
		m, ok := v.(map[string]any)
		name, isString := m["name"].(string)
		if !ok || !isString {
			return block // faulted where it is read
		}
		services[name] = m
	}
	block = maps.Clone(block)
	block["services"] = services
	return block
}

// mergeMaps returns base with over merged over it: maps by key, anything else
// replaced.
func mergeMaps(base, over map[string]any) map[string]any {
	merged := maps.Clone(base)
	for key, value := range over {
		b, bok := merged[key].(map[string]any)
		o, ook := value.(map[string]any)
		if bok && ook {
			value = mergeMaps(b, o)
		}
		merged[key] = value
	}
	return merged
}
