package httpserve

import (
	"bytes"
	"encoding/json"
	"iter"
	"slices"
	"strings"
)

// The faults of a body that is to be an object.
var (
	errJSON     = invalidf("body is not one JSON text")
	errNoObject = invalidf("body is not an object")
)

// membersOf returns the texts of those members of a JSON object that have one of
// these names. A body that is empty has none; a member that is null is not there,
// and one that is there twice is refused: whoever asks and whoever answers may
// take another one.
func membersOf(text []byte, names ...string) (map[string][]byte, error) {
	text = bytes.TrimSpace(text)
	if len(text) == 0 {
		return nil, nil
	}
	if !json.Valid(text) {
		return nil, errJSON
	}
	if text[0] != '{' {
		return nil, errNoObject
	}
	found := make(map[string][]byte, len(names))
	for name, value := range members(text) {
		if !slices.Contains(names, name) {
			continue
		}
		if found[name] != nil {
			return nil, invalidf("body has %q twice", name)
		}
		found[name] = value
	}
	for name, value := range found {
		if string(value) == "null" {
			delete(found, name)
		}
	}
	return found, nil
}

// members yields the members of an object, in their order, with the texts of
// their values. The text must be one that is valid.
func members(text []byte) iter.Seq2[string, []byte] {
	return func(yield func(string, []byte) bool) {
		i := skipSpace(text, 1)
		for text[i] != '}' {
			end := endOfString(text, i)
			name := nameOf(text[i:end])
			i = skipSpace(text, skipSpace(text, end)+1) // the colon
			end = endOfValue(text, i)
			if !yield(name, text[i:end]) {
				return
			}
			if i = skipSpace(text, end); text[i] == ',' {
				i = skipSpace(text, i+1)
			}
		}
	}
}

// nameOf returns the string that a text is.
func nameOf(text []byte) string {
	if bytes.IndexByte(text, '\\') < 0 {
		return strings.ToValidUTF8(string(text[1:len(text)-1]), "\uFFFD")
	}
	var s string
	_ = json.Unmarshal(text, &s) // it is a valid string
	return s
}

func skipSpace(text []byte, i int) int {
	for text[i] == ' ' || text[i] == '\t' || text[i] == '\r' || text[i] == '\n' {
		i++
	}
	return i
}

// endOfString returns where the string that begins at i ends.
func endOfString(text []byte, i int) int {
	for i++; text[i] != '"'; i++ {
		if text[i] == '\\' {
			i++
		}
	}
	return i + 1
}

// endOfValue returns where the value that begins at i ends.
func endOfValue(text []byte, i int) int {
	switch text[i] {
	case '"':
		return endOfString(text, i)
	case '{', '[':
		for depth := 0; ; i++ {
			switch text[i] {
			case '"':
				i = endOfString(text, i) - 1
			case '{', '[':
				depth++
			case '}', ']':
				if depth--; depth == 0 {
					return i + 1
				}
			}
		}
	}
	for i < len(text) && !bytes.ContainsRune([]byte(",}] \t\r\n"), rune(text[i])) {
		i++
	}
	return i
}
