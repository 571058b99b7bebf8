package plan

import (
	"runtime"
	"testing"

	"github.com/gatehouse-authz/gatehouse/document"
)

// TestSize compares Size with what a Program takes.
func TestSize(t *testing.T) {
	for _, bc := range benchCases {
		c := bc.make(t)
		data, err := document.Of(c.data)
		if err != nil {
			t.Fatal(err)
		}
		p, err := Of(c.compiler(t), benchQuery)
		if err != nil {
			t.Fatal(err)
		}
		const n = 20
		progs := make([]*Program, n)
		before, remembered := heap(), data.Size()
		for i := range progs {
			if progs[i], err = Compile(p, data.Root()); err != nil {
				t.Fatal(err)
			}
		}
		// What the document has come to remember is its own.
		is := (int64(heap()-before) - (data.Size() - remembered)) / n
		says := progs[0].Size() - progs[0].reserved // for indexes, which are made later
		t.Logf("%s: %d bytes, %d statements, %d functions, Size says %d", bc.name, is, progs[0].stmts, len(progs[0].funcs), says)
		if says > 3*is || is > 3*says {
			t.Errorf("%s: a Program takes %d bytes, Size says %d", bc.name, is, says)
		}
		runtime.KeepAlive(progs)
	}
}

func heap() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
