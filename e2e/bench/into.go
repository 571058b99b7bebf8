package main

import (
	"fmt"
	"os"
	"strings"
)

// into writes the tables into a page, each part between its marks:
//
//	<!-- bench: check -->
//	<!-- end: check -->
//
// A part that has no marks in the page is an error.
func (r *results) into(file string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	page, written := string(text), map[string]*strings.Builder{}
	for i := range r.Tables {
		t := &r.Tables[i]
		b := written[t.Part]
		if b == nil {
			b = new(strings.Builder)
			written[t.Part] = b
			fmt.Fprintf(b, "\n%s: %s.\n", r.Machine.At.Format("2006-01-02"), &r.Machine)
		}
		if err := t.markdown(b); err != nil {
			return err
		}
	}
	for part, b := range written {
		begin, end := "<!-- bench: "+part+" -->\n", "<!-- end: "+part+" -->"
		before, rest, ok := strings.Cut(page, begin)
		_, after, ok2 := strings.Cut(rest, end)
		if !ok || !ok2 {
			return fmt.Errorf("%s has not both %q and %q", file, begin, end)
		}
		page = before + begin + b.String() + "\n" + end + after
	}
	return os.WriteFile(file, []byte(page), 0o644)
}
