// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"encoding/json"
	"fmt"
	"html"
	"math"
	"slices"
	"strings"
	"time"
)

// Sizes in pixels. The grid is Grafana's: 24 columns, and rows of a height.
const (
	column, row = 42, 29
	margin      = 14
	gap         = 6 // between panels
	header      = 88
	letter      = 5.7 // the mean width of one in the text of legends and axes
)

const (
	ink   = "#2f3b47"
	pale  = "#76828e"
	line  = "#e4e8ec"
	shade = "#f6f0e4" // of a phase
)

// palette is for series whose colour the dashboard leaves open.
func palette(i int) string {
	colors := []string{"#2f6fab", "#d9822b", "#4f9d69", "#b5495b", "#7d5ba6", "#3a9fa0", "#a68a3a", "#d67fb0", "#6b7a89", "#8c5a44"}
	return colors[i%len(colors)]
}

// named gives Grafana's names of colours their value here.
func named(c string) string {
	switch c {
	case "green", "":
		return "#3a7d52"
	case "orange":
		return "#c9761c"
	case "red":
		return "#b5394a"
	case "text":
		return ink
	}
	return c
}

// canvas is an SVG as it is written.
type canvas struct {
	strings.Builder
	w      window
	phases []phase
}

// draw returns the dashboard as SVG.
func draw(d *dashboard, w window, phases []phase) string {
	c := &canvas{w: w, phases: phases}
	bottom := 0.
	for _, p := range d.Panels {
		bottom = max(bottom, p.GridPos.Y+p.GridPos.H)
	}
	width, height := 24*column+2*margin, header+bottom*row+margin
	c.printf(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %.0f" width="%d" height="%.0f" font-family="DejaVu Sans, Verdana, sans-serif" font-size="10.5" fill="%s">`, width, height, width, height, ink)
	c.printf(`<rect width="100%%" height="100%%" fill="#f7f8fa"/>`)
	c.text(margin, 28, `font-size="18" font-weight="bold"`, d.Title)
	c.text(margin, 46, `font-size="11" fill="`+pale+`"`, fmt.Sprintf("%s of load on a real Vault with a simulated Cable, scraped by a real Prometheus. Shaded is what Cable did meanwhile:", w.end.Sub(w.start).Round(time.Second)))
	// The phases in two lines of four.
	for i, p := range phases {
		x, y := float64(margin+(i%4)*24*column/4), float64(64+(i/4)*16)
		c.printf(`<rect x="%.0f" y="%.0f" width="15" height="12" fill="%s" stroke="#dccfb4"/>`, x, y-9.5, shade)
		c.text(x+7.5, y, `text-anchor="middle" font-size="9"`, fmt.Sprint(i+1))
		c.text(x+20, y, ``, p.name)
	}
	for _, p := range d.Panels {
		x, y := margin+p.GridPos.X*column, header+p.GridPos.Y*row
		w, h := p.GridPos.W*column-gap, p.GridPos.H*row-gap
		if p.Type == "row" {
			c.text(x+2, y+17, `font-size="13" font-weight="bold"`, p.Title)
			continue
		}
		c.printf(`<rect x="%.0f" y="%.0f" width="%.0f" height="%.0f" rx="3" fill="white" stroke="%s"/>`, x, y, w, h, line)
		c.text(x+10, y+18, `font-size="11.5" font-weight="bold"`, p.Title)
		if p.Type == "stat" {
			c.stat(&p, x, y, w, h)
		} else {
			c.timeseries(&p, x, y, w, h)
		}
	}
	c.printf(`</svg>`)
	return c.String()
}

func (c *canvas) printf(format string, args ...any) { fmt.Fprintf(&c.Builder, format+"\n", args...) }

// text writes text, with attributes as they stand.
func (c *canvas) text(x, y float64, attributes, text string) {
	c.printf(`<text x="%.0f" y="%.1f" %s>%s</text>`, x, y, attributes, html.EscapeString(text))
}

// stat draws the last value of each series as large as fits.
func (c *canvas) stat(p *panel, x, y, w, h float64) {
	var values []string
	fill := ""
	for _, s := range p.series {
		text, color := p.shown(s)
		values = append(values, text)
		fill = color
	}
	text := strings.Join(values, ", ")
	size := min(28, (w-20)/(.68*float64(len(text))))
	c.text(x+w/2, y+20+(h-20)/2+size/3, fmt.Sprintf(`text-anchor="middle" font-size="%.0f" fill="%s"`, size, fill), text)
}

// shown is the text and the colour of a series' last value.
func (p *panel) shown(s series) (text, color string) {
	v, defaults := s.last(), p.FieldConfig.Defaults
	for _, m := range defaults.Mappings {
		if o, ok := m.Options[fmt.Sprint(v)]; ok {
			return o.Text, named(o.Color)
		}
	}
	color = defaults.Color.FixedColor
	for _, t := range defaults.Thresholds.Steps {
		if t.Value == nil || v >= *t.Value {
			color = t.Color
		}
	}
	if p.Options.TextMode == "name" {
		return s.name, named(color)
	}
	return format(defaults.Unit, v), named(color)
}

// timeseries draws lines or stacked areas over the time, with axes and a legend.
func (c *canvas) timeseries(p *panel, x, y, w, h float64) {
	stacked := p.FieldConfig.Defaults.Custom.Stacking.Mode == "normal"
	all := p.series
	if stacked { // the most at the bottom
		slices.SortStableFunc(all, func(a, b series) int { return int(math.Copysign(1, sum(b)-sum(a))) })
	}
	colors := p.colors(all)
	legend := c.legend(all, colors, x+10, y+h-10, w-20)

	// The plot's own rectangle, between title, axes and legend.
	left, top, right, bottom := x+52, y+32, x+w-20, y+h-26-legend
	lower, upper := stack(all, stacked)
	most := 0.
	for _, values := range upper {
		for _, v := range values {
			if !math.IsNaN(v) {
				most = max(most, v)
			}
		}
	}
	unit := p.FieldConfig.Defaults.Unit
	step := tick(unit, most)
	most = step * max(1, math.Ceil(most/step-1e-9))
	px := func(i float64) float64 { return left + (right-left)*i/float64(c.w.steps()-1) }
	py := func(v float64) float64 { return bottom - (bottom-top)*v/most }
	at := func(t time.Time) float64 { return px(float64(t.Sub(c.w.start)) / float64(c.w.step)) }

	for i, ph := range c.phases {
		from, to := at(ph.from), at(ph.to)
		c.printf(`<rect x="%.1f" y="%.0f" width="%.1f" height="%.0f" fill="%s"/>`, from, top, to-from, bottom-top, shade)
		c.text((from+to)/2, top-3, `text-anchor="middle" font-size="8.5" fill="`+pale+`"`, fmt.Sprint(i+1))
	}
	for v := 0.; v <= most+step/2; v += step {
		c.printf(`<path d="M%.0f %.1fH%.0f" stroke="%s"/>`, left, py(v), right, line)
		c.text(left-5, py(v)+3.5, `text-anchor="end" fill="`+pale+`"`, format(unit, v))
	}
	for t := time.Duration(0); t <= c.w.end.Sub(c.w.start); t += timeTick(c.w.end.Sub(c.w.start), right-left) {
		c.text(at(c.w.start.Add(t)), bottom+14, `text-anchor="middle" fill="`+pale+`"`, fmt.Sprintf("%d:%02d", int(t.Minutes()), int(t.Seconds())%60))
	}
	opacity := p.FieldConfig.Defaults.Custom.FillOpacity / 100
	for i := range all {
		for _, run := range runs(upper[i]) {
			path := curve(upper[i], run, px, py)
			if opacity > 0 {
				c.printf(`<path d="%s%sZ" fill="%s" fill-opacity="%.2g"/>`, path, strings.Replace(backwards(lower[i], run, px, py), "M", "L", 1), colors[i], opacity)
			}
			if !stacked {
				c.printf(`<path d="%s" fill="none" stroke="%s" stroke-width="1.5" stroke-linejoin="round"/>`, path, colors[i])
			}
		}
	}
}

// colors returns the colour of each series: the dashboard's or the palette's.
func (p *panel) colors(all []series) []string {
	colors := make([]string, len(all))
	free := 0
	for i, s := range all {
		for _, o := range p.FieldConfig.Overrides {
			for _, property := range o.Properties {
				var c color
				if o.Matcher.Options == s.name && property.ID == "color" && json.Unmarshal(property.Value, &c) == nil {
					colors[i] = named(c.FixedColor)
				}
			}
		}
		if colors[i] == "" {
			colors[i] = palette(free)
			free++
		}
	}
	return colors
}

// legend writes the names from the bottom up, in as many lines as it takes, and
// returns its height.
func (c *canvas) legend(all []series, colors []string, x, bottom, w float64) float64 {
	const lineHeight = 15
	type entry struct {
		x    float64
		line int
	}
	places := make([]entry, len(all))
	at, lines := 0., 0
	for i, s := range all {
		width := 14 + letter*float64(len(s.name)) + 14
		if at > 0 && at+width > w+14 {
			at, lines = 0, lines+1
		}
		places[i] = entry{x + at, lines}
		at += width
	}
	for i, s := range all {
		y := bottom - float64(lines-places[i].line)*lineHeight
		c.printf(`<rect x="%.0f" y="%.0f" width="9" height="9" rx="2" fill="%s"/>`, places[i].x, y-8, colors[i])
		c.text(places[i].x+13, y, ``, s.name)
	}
	return float64(lines+1) * lineHeight
}

// stack returns the lower and the upper edge of each series.
func stack(all []series, stacked bool) (lower, upper [][]float64) {
	for i, s := range all {
		below := make([]float64, len(s.values))
		if stacked && i > 0 {
			copy(below, upper[i-1])
		}
		above := make([]float64, len(s.values))
		for j, v := range s.values {
			if stacked && math.IsNaN(v) {
				v = 0
			}
			above[j] = below[j] + v
		}
		lower, upper = append(lower, below), append(upper, above)
	}
	return lower, upper
}

func sum(s series) (total float64) {
	for _, v := range s.values {
		if !math.IsNaN(v) {
			total += v
		}
	}
	return total
}

// runs returns the parts without a gap, as pairs of the first index and the one
// after the last.
func runs(values []float64) (found [][2]int) {
	for i := 0; i < len(values); i++ {
		from := i
		for i < len(values) && !math.IsNaN(values[i]) {
			i++
		}
		if i > from {
			found = append(found, [2]int{from, i})
		}
	}
	return found
}

// curve is a path through values. What lies level between its neighbours is left
// out: most of what rarely happens is.
func curve(values []float64, run [2]int, px, py func(float64) float64) string {
	var b strings.Builder
	for i := run[0]; i < run[1]; i++ {
		if i > run[0] && i < run[1]-1 && values[i] == values[i-1] && values[i] == values[i+1] {
			continue
		}
		if b.Len() == 0 {
			b.WriteByte('M')
		} else {
			b.WriteByte('L')
		}
		fmt.Fprintf(&b, "%.1f %.1f", px(float64(i)), py(values[i]))
	}
	return b.String()
}

// backwards is the same from its end.
func backwards(values []float64, run [2]int, px, py func(float64) float64) string {
	reversed := slices.Clone(values[run[0]:run[1]])
	slices.Reverse(reversed)
	last := float64(run[1] - 1)
	return curve(reversed, [2]int{0, len(reversed)}, func(i float64) float64 { return px(last - i) }, py)
}

// tick is the distance of an axis' lines, for some four of them.
func tick(unit string, most float64) float64 {
	base := 1.
	switch {
	case unit == "bytes":
		base = 1 << 20
	case unit == "s" && most > 60:
		for _, s := range []float64{60, 300, 600, 1800, 3600, 7200, 14400, 28800, 43200} {
			if most/s <= 5 {
				return s
			}
		}
		return 86400
	}
	if most == 0 {
		return base
	}
	raw := most / base / 4
	power := math.Pow(10, math.Floor(math.Log10(raw)))
	for _, n := range []float64{1, 2, 5, 10} {
		if raw <= n*power*1.0001 {
			if step := n * power * base; unit != "short" || step >= 1 { // what is counted comes in ones
				return step
			}
			return 1
		}
	}
	return 10 * power * base
}

// timeTick is the distance of the times below an axis of a width.
func timeTick(d time.Duration, width float64) time.Duration {
	for _, t := range []time.Duration{10 * time.Second, 30 * time.Second, time.Minute, 2 * time.Minute, 5 * time.Minute, 10 * time.Minute} {
		if width*float64(t)/float64(d) >= 42 {
			return t
		}
	}
	return time.Hour
}

// format writes a value in one of Grafana's units that the dashboard uses.
func format(unit string, v float64) string {
	short := func(v float64) string { return fmt.Sprintf("%.3g", v) }
	switch {
	case math.IsNaN(v):
		return "no data"
	case unit == "ops" || unit == "reqps":
		return short(v) + "/s"
	case unit == "bytes":
		return short(v/(1<<20)) + " MiB"
	case unit == "percentunit":
		return short(v*100) + " %"
	case unit == "s" && v == 0:
		return "0"
	case unit == "s":
		for _, u := range []struct {
			name string
			size float64
		}{{" d", 86400}, {" h", 3600}, {" min", 60}, {" s", 1}} {
			if v >= u.size {
				return short(v/u.size) + u.name
			}
		}
		return short(v*1000) + " ms"
	}
	if v == math.Trunc(v) {
		return fmt.Sprintf("%.0f", v)
	}
	return short(v)
}
