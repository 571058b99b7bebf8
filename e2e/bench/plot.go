package main

import (
	"fmt"
	"math"
	"slices"
	"strings"
)

// The size of a panel, with what is around it, in pixels.
const (
	panelWidth, panelHeight = 190, 150
	panelLeft, panelTop     = 56, 44
	panelRight, panelBottom = 14, 46
)

// colours of the quotas: they differ in lightness, too.
var colours = []string{"#0b3c8c", "#d1495b", "#2a9d4e", "#e09f3e"}

// drawQuotas draws a panel for each load: above p99, below how much of the time the
// group was throttled, each over GOMAXPROCS, a line for each quota.
func drawQuotas(cells []quotaCell) string {
	var loads []string
	var quotas []float64
	high := 1.0
	for _, c := range cells {
		if !slices.Contains(loads, c.load) {
			loads = append(loads, c.load)
		}
		if !slices.Contains(quotas, c.quota) {
			quotas = append(quotas, c.quota)
		}
		high = max(high, c.p99)
	}
	stepX, stepY := panelLeft+panelWidth+panelRight, panelTop+panelHeight+panelBottom
	width, height := stepX*len(loads), 2*stepY+24
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="sans-serif" font-size="11" fill="#222">`+"\n", width, height, width, height)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="#fff"/>`+"\n", width, height)
	decades := math.Ceil(math.Log10(high))
	for i, load := range loads {
		for kind, p := range []panel{
			{x: i*stepX + panelLeft, y: panelTop, title: load + ": p99, ms", low: 0, high: decades, power: true},
			{x: i*stepX + panelLeft, y: stepY + panelTop, title: load + ": throttled, % of periods", low: 0, high: 100},
		} {
			p.frame(&b)
			for q, quota := range quotas {
				var points []string
				for _, c := range cells {
					if c.load != load || c.quota != quota || c.procs == 0 {
						continue
					}
					v := c.throttled * 100
					if kind == 0 {
						v = math.Log10(max(c.p99, 1))
					}
					points = append(points, fmt.Sprintf("%.1f,%.1f", p.atX(c.procs), p.atY(v)))
				}
				fmt.Fprintf(&b, `<polyline fill="none" stroke="%s" stroke-width="2" points="%s"/>`+"\n", colours[q%len(colours)], strings.Join(points, " "))
				for _, point := range points {
					x, y, _ := strings.Cut(point, ",")
					fmt.Fprintf(&b, `<circle cx="%s" cy="%s" r="2.5" fill="%s"/>`+"\n", x, y, colours[q%len(colours)])
				}
			}
		}
	}
	for q, quota := range quotas {
		x := panelLeft + q*130
		fmt.Fprintf(&b, `<rect x="%d" y="%d" width="14" height="4" fill="%s"/><text x="%d" y="%d">quota of %g CPUs</text>`+"\n",
			x, height-16, colours[q%len(colours)], x+20, height-11, quota)
	}
	b.WriteString("</svg>\n")
	return b.String()
}

// panel is one diagram.
type panel struct {
	x, y      int // of its upper left corner
	title     string
	low, high float64
	power     bool // the values are logarithms
}

func (p *panel) atX(procs int) float64 {
	return float64(p.x) + panelWidth*(float64(procs)-0.5)/quotaProcs
}

func (p *panel) atY(v float64) float64 {
	return float64(p.y) + panelHeight*(1-(v-p.low)/(p.high-p.low))
}

// frame draws the axes.
func (p *panel) frame(b *strings.Builder) {
	fmt.Fprintf(b, `<text x="%d" y="%d" font-weight="bold">%s</text>`+"\n", p.x, p.y-12, p.title)
	fmt.Fprintf(b, `<rect x="%d" y="%d" width="%d" height="%d" fill="none" stroke="#999"/>`+"\n", p.x, p.y, panelWidth, panelHeight)
	for procs := 1; procs <= quotaProcs; procs++ {
		fmt.Fprintf(b, `<text x="%.1f" y="%d" text-anchor="middle">%d</text>`+"\n", p.atX(procs), p.y+panelHeight+14, procs)
	}
	fmt.Fprintf(b, `<text x="%d" y="%d" text-anchor="middle">GOMAXPROCS</text>`+"\n", p.x+panelWidth/2, p.y+panelHeight+29)
	ticks := []float64{0, 25, 50, 75, 100}
	if p.power {
		ticks = nil
		for v := p.low; v <= p.high; v++ {
			ticks = append(ticks, v)
		}
	}
	for _, v := range ticks {
		label := v
		if p.power {
			label = math.Pow(10, v)
		}
		fmt.Fprintf(b, `<line x1="%d" x2="%d" y1="%.1f" y2="%.1f" stroke="#ddd"/><text x="%d" y="%.1f" text-anchor="end">%.0f</text>`+"\n",
			p.x, p.x+panelWidth, p.atY(v), p.atY(v), p.x-5, p.atY(v)+4, label)
	}
}
