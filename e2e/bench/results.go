package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"strconv"
	"strings"
	"text/tabwriter"
)

// results are what a run found, as they are written with -json.
type results struct {
	Machine machine `json:"machine"`
	Tables  []table `json:"tables"`
}

// table is what one part of a run found.
type table struct {
	Part    string `json:"part"`
	Title   string `json:"title"`
	Columns []col  `json:"columns"`
	Rows    []row  `json:"rows"`
}

// col is one column: of names, or of numbers with so many digits.
type col struct {
	Name   string `json:"name"`
	Digits int    `json:"digits"` // names: -1
}

// row has a string or a number in each column. A number that is not known is NaN,
// or null in JSON.
type row []any

// columns reads "name, number:1", a column each, with the digits of numbers.
func columns(text string) (cols []col) {
	for _, part := range strings.Split(text, ", ") {
		name, digits, number := strings.Cut(part, ":")
		c := col{name, -1}
		if number {
			c.Digits, _ = strconv.Atoi(digits) // of our own making
		}
		cols = append(cols, c)
	}
	return cols
}

// unknown is a number that is not known.
var unknown = math.NaN()

// text is a cell as it is printed.
func (c col) text(v any) string {
	n, ok := v.(float64)
	switch {
	case !ok && v == nil || math.IsNaN(n):
		return "n/a"
	case !ok:
		return fmt.Sprint(v)
	}
	return strconv.FormatFloat(n, 'f', max(c.Digits, 0), 64)
}

// MarshalJSON has null for numbers that are not known, which JSON has not.
func (r row) MarshalJSON() ([]byte, error) {
	cells := make([]any, len(r))
	for i, v := range r {
		if n, ok := v.(float64); !ok || !math.IsNaN(n) {
			cells[i] = v
		}
	}
	return json.Marshal(cells)
}

// print writes the table as text, or as Markdown.
func (t *table) print(w io.Writer, markdown bool) error {
	if markdown {
		return t.markdown(w)
	}
	var text bytes.Buffer
	tab := tabwriter.NewWriter(&text, 0, 0, 2, ' ', tabwriter.AlignRight)
	for _, c := range t.Columns {
		fmt.Fprint(tab, c.Name, "\t")
	}
	fmt.Fprintln(tab)
	for _, r := range t.Rows {
		for i, c := range t.Columns {
			fmt.Fprint(tab, c.text(r[i]), "\t")
		}
		fmt.Fprintln(tab)
	}
	if err := tab.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, "\n%s: %s\n\n%s", t.Part, t.Title, text.String())
	return err
}

func (t *table) markdown(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "\n%s (`-only %s`):\n\n|", upperFirst(t.Title), t.Part)
	for _, c := range t.Columns {
		fmt.Fprintf(&b, " %s |", c.Name)
	}
	b.WriteString("\n|")
	for _, c := range t.Columns {
		b.WriteString(map[bool]string{true: "---|", false: "---:|"}[c.Digits < 0])
	}
	for _, r := range t.Rows {
		b.WriteString("\n|")
		for i, c := range t.Columns {
			fmt.Fprintf(&b, " %s |", c.text(r[i]))
		}
	}
	b.WriteByte('\n')
	_, err := io.WriteString(w, b.String())
	return err
}

func upperFirst(s string) string {
	if s == "" {
		return s
	}
	return strings.ToUpper(s[:1]) + s[1:]
}

// name is what says which row of its table a row is.
func (t *table) name(r row) string {
	var names []string
	for i, c := range t.Columns {
		if c.Digits < 0 {
			names = append(names, fmt.Sprint(r[i]))
		}
	}
	return t.Part + ": " + strings.Join(names, ", ")
}

// save writes the results to a file.
func (r *results) save(file string) error {
	text, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(text, '\n'), 0o644)
}

// compare prints figures of each row beside those of an earlier run, which file
// holds. CPU times of checks are compared by their ratio to the always-allow server
// of the same run: machines differ, and so does what else they do.
func (r *results) compare(file string, w io.Writer, markdown bool) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var old results
	if err := json.Unmarshal(text, &old); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	was := map[string]float64{}
	each := func(from *results, do func(name, column string, value float64)) {
		for i := range from.Tables {
			t := &from.Tables[i]
			for _, row := range t.Rows {
				for j, c := range t.Columns {
					if n, ok := row[j].(float64); ok && compared[c.Name] && !math.IsNaN(n) {
						do(t.name(row), c.Name, n)
					}
				}
			}
		}
	}
	each(&old, func(name, column string, n float64) { was[name+"\n"+column] = n })
	t := table{Part: "compare", Title: "against " + file + " (" + old.Machine.CPU + ")", Columns: columns("what, figure, before:2, now:2, now/before:2")}
	each(r, func(name, column string, n float64) {
		if before, ok := was[name+"\n"+column]; ok && before > 0 {
			t.Rows = append(t.Rows, row{name, column, before, n, n / before})
		}
	})
	return t.print(w, markdown)
}

// compared are the columns that compare looks at.
var compared = map[string]bool{ratioColumn: true, "CPU µs/item": true, "allocations": true, "RSS MiB": true, "KB/tenant": true}

const ratioColumn = "× always-allow"
