package plan

import (
	"bytes"
	"fmt"
	"strings"
	"text/template"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/topdown"
	"github.com/open-policy-agent/opa/v1/topdown/builtins"
)

// renderTemplate is strings.render_template. A template can make any amount of text
// of little: it ends where what it writes, or keeps in variables, is over MaxBuilt, and
// when the evaluation is cancelled.
func renderTemplate(bctx topdown.BuiltinContext, operands []*ast.Term, iter func(*ast.Term) error) error {
	text, err := builtins.StringOperand(operands[0].Value, 1)
	if err != nil {
		return err
	}
	object, err := builtins.ObjectOperand(operands[1].Value, 2)
	if err != nil {
		return err
	}
	var variables map[string]any
	if err := ast.As(object, &variables); err != nil {
		return err
	}
	w := &templateWriter{bctx: &bctx, left: MaxBuilt}
	t, err := template.New("template").Funcs(w.funcs()).Parse(string(text))
	if err != nil {
		return err
	}
	if err = t.Execute(w, variables); w.err != nil {
		return w.err
	}
	if err != nil {
		return err
	}
	return iter(ast.StringTerm(strings.ReplaceAll(w.text.String(), "<no value>", "<undefined>")))
}

// templateWriter takes what a template writes.
type templateWriter struct {
	bctx *topdown.BuiltinContext
	text bytes.Buffer
	left allowance
	err  error // why the evaluation ends
}

func (w *templateWriter) Write(p []byte) (int, error) {
	if err := w.take(int64(len(p))); err != nil {
		return 0, err
	}
	return w.text.Write(p)
}

// take takes n bytes of what may be built.
func (w *templateWriter) take(n int64) error {
	if w.err == nil {
		w.err = cancelled(w.bctx, ast.RenderTemplate.Name)
	}
	if w.left -= allowance(n); w.left < 0 && w.err == nil {
		w.err = tooLarge(ast.RenderTemplate.Name)
	}
	return w.err
}

// funcs are the functions of package text/template that build texts, within bounds.
func (w *templateWriter) funcs() template.FuncMap {
	within := func(f func(...any) string, grows int64) func(...any) (string, error) {
		return func(args ...any) (string, error) {
			n := int64(0)
			for _, a := range args {
				n += int64(len(fmt.Sprint(a))) + 1
			}
			if err := w.take(product(n, grows)); err != nil {
				return "", err
			}
			return f(args...), nil
		}
	}
	return template.FuncMap{
		"print":    within(fmt.Sprint, 1),
		"println":  within(fmt.Sprintln, 1),
		"html":     within(template.HTMLEscaper, 5),
		"js":       within(template.JSEscaper, 6),
		"urlquery": within(template.URLQueryEscaper, 3),
		"printf": func(format string, args ...any) (string, error) {
			n, _ := sprintfMemory(w.left, []*ast.Term{ast.StringTerm(format), ast.ArrayTerm(templateOperands(args)...)})
			if err := w.take(n); err != nil {
				return "", err
			}
			return fmt.Sprintf(format, args...), nil
		},
	}
}

// templateOperands are the texts of operands.
func templateOperands(args []any) (list []*ast.Term) {
	for _, a := range args {
		list = append(list, ast.StringTerm(fmt.Sprint(a)))
	}
	return list
}
