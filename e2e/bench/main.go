// Command bench measures what Gatehouse costs: the CPU time of the server process
// per check, beside that of a server that allows everything without looking, in
// one run under the same load.
//
//	go run ./bench [-gatehouse PATH] [-only check,batch] [-rounds 4] [-round 2s]
//
// The parts, of which those with a star are made only when named:
//
//	check    three policies, both evaluators, decision log off and on; one check
//	         after the other, 16 in flight on one connection
//	rate     the same at a constant rate (-rate), measured from when each was due
//	tenants  one tenant asked, and 1,000 in turn
//	body     checks with a body of 64 KiB
//	large    1,000 rules; data of 100,000 entries
//	batch    batches of 1 to 1,000 items over HTTP
//	list     permission lists: computed, remembered, 304
//	envoy    through a real Envoy: no authorization, always-allow, Gatehouse
//	density* what idle tenants take (-tenants, -data)
//	cpu*     CPU quotas, GOMAXPROCS and batch sizes: p99 and throttling; as root
//	pgo*     records CPU profiles under the load of the others (-profile FILE)
//
// The servers of a part take turns, round by round, so that a disturbance of the
// machine hits all, and CPU times are those of the round in the middle. What each policy answers is verified before it is measured.
// Servers with a decision log send it to a service of the bench; what delivering
// takes after a round counts too. Allocations are those of the server process, as
// its metrics have them, less what asking for metrics allocates.
//
// -base PATH has another binary of Gatehouse measured in turn with the first.
// -into FILE writes the tables into a page of Markdown, such as docs/performance.md;
// -json FILE writes what was found, and -compare FILE puts an earlier such file
// beside it. With PEER naming a binary of opa-envoy-plugin, that is measured too:
// one process for each policy, since it has one tenant.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, os.Args[1:], os.Getenv("PEER"), os.Stdout, os.Stderr)
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// bench is a run.
type bench struct {
	dir         string
	machine     machine
	binary      string // of Gatehouse
	base        string // another one, "": none
	peerBinary  string // "": none
	envoyBinary string
	evaluators  []string
	roundCount  int
	roundTime   time.Duration
	perSecond   float64 // of loads at a constant rate
	density     densityOptions
	quotaSizes  string  // of part cpu, in CPUs, with commas
	quotaBusy   float64 // of a quota that the loads of part cpu need
	plot        string  // file that part cpu draws; "": none
	profile     string  // file that part pgo writes
	progress    io.Writer

	running []*stage.Process // of the part that runs
	closing []func()
}

// part is what is measured together.
type part struct {
	name   string
	asked  bool // only when it is named
	tables func(*bench, context.Context) ([]table, error)
}

var parts = []part{
	{"check", false, (*bench).checks},
	{"rate", false, (*bench).rate},
	{"tenants", false, (*bench).tenants},
	{"body", false, (*bench).bodies},
	{"large", false, (*bench).large},
	{"batch", false, (*bench).batch},
	{"list", false, (*bench).list},
	{"envoy", false, (*bench).envoy},
	{"density", true, (*bench).idle},
	{"cpu", true, (*bench).quotas},
	{"pgo", true, (*bench).record},
}

func run(ctx context.Context, args []string, peer string, stdout, stderr io.Writer) error {
	b := &bench{peerBinary: peer, progress: stderr}
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.StringVar(&b.binary, "gatehouse", os.Getenv("GATEHOUSE_BIN"), "`path` of the binary; empty: it is built")
	flags.StringVar(&b.base, "base", "", "`path` of another binary of Gatehouse, measured in turn with it")
	flags.StringVar(&b.envoyBinary, "envoy", "../.cache/envoy-1.40.0", "`path` of Envoy")
	evaluators := flags.String("evaluators", "topdown,plan", "`names` of those that are measured")
	only := flags.String("only", "", "`parts` to run, with commas; empty: all but density, cpu and pgo")
	flags.IntVar(&b.roundCount, "rounds", 4, "rounds of each contender")
	flags.DurationVar(&b.roundTime, "round", 2*time.Second, "how long one is")
	flags.Float64Var(&b.perSecond, "rate", 2000, "checks a second, where the rate is constant")
	file := flags.String("json", "", "`file` to write what was found to")
	earlier := flags.String("compare", "", "`file` of an earlier run to compare with")
	markdown := flags.Bool("markdown", false, "print tables as Markdown")
	page := flags.String("into", "", "`page` of Markdown to write the tables into, between the marks of their parts")
	flags.Var(&b.density.tenants, "tenants", "`numbers` of tenants of density, with commas (default 1000,10000)")
	flags.Var(&b.density.data, "data", "`KB` of data of each, with commas (default 0,10,100)")
	flags.StringVar(&b.quotaSizes, "quotas", quotaSizes, "`CPUs` that part cpu allows, with commas")
	flags.Float64Var(&b.quotaBusy, "busy", 0.4, "`share` of the quota that the loads of part cpu need")
	flags.StringVar(&b.plot, "plot", "", "`file` that cpu draws (SVG)")
	flags.StringVar(&b.profile, "profile", "", "`file` that pgo writes")
	if err := flags.Parse(args); err != nil {
		return err
	}
	chosen, err := choose(*only)
	if err != nil {
		return err
	}
	if flags.NArg() > 0 || b.roundCount < 1 || b.roundTime <= 0 || b.perSecond <= 0 || b.quotaBusy <= 0 {
		return errors.New("an argument that is no flag, or a number that makes no sense")
	}
	b.evaluators = strings.Split(*evaluators, ",")
	if b.dir, err = os.MkdirTemp("", "gatehouse-bench-"); err != nil {
		return err
	}
	defer os.RemoveAll(b.dir)
	defer b.end()
	if b.binary == "" {
		if b.binary, err = stage.Build(ctx, b.dir, "../cmd/gatehouse"); err != nil {
			return err
		}
	}
	if b.envoyBinary, err = filepath.Abs(b.envoyBinary); err != nil {
		return err
	}

	b.machine = describe(b.binary, b.envoyBinary, b.roundCount, b.roundTime)
	fmt.Fprintln(stdout, &b.machine)
	found := &results{Machine: b.machine}
	for _, p := range chosen {
		b.say("%s", p.name)
		tables, err := p.tables(b, ctx)
		b.end()
		if err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
		for i := range tables {
			if err := tables[i].print(stdout, *markdown); err != nil {
				return err
			}
		}
		found.Tables = append(found.Tables, tables...)
	}
	if *file != "" {
		if err := found.save(*file); err != nil {
			return err
		}
	}
	if *page != "" {
		if err := found.into(*page); err != nil {
			return err
		}
	}
	if *earlier != "" {
		return found.compare(*earlier, stdout, *markdown)
	}
	return nil
}

// choose returns the parts that are named, or those of a usual run.
func choose(only string) (chosen []part, err error) {
	var names []string
	if only != "" {
		names = strings.Split(only, ",")
	}
	for _, p := range parts {
		if len(names) == 0 && !p.asked || slices.Contains(names, p.name) {
			chosen = append(chosen, p)
		}
	}
	for _, name := range names {
		if !slices.ContainsFunc(parts, func(p part) bool { return p.name == name }) {
			return nil, fmt.Errorf("there is no part %q", name)
		}
	}
	return chosen, nil
}

// say tells who waits how far the run is.
func (b *bench) say(format string, args ...any) {
	fmt.Fprintf(b.progress, time.Now().Format("15:04:05 ")+format+"\n", args...)
}
