// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
)

// chart draws a report's reads per second, the engine beside the floor, as SVG.
func chart(jsonFile, svgFile string) error {
	raw, err := os.ReadFile(jsonFile)
	if err != nil {
		return err
	}
	var report Report
	if err := json.Unmarshal(raw, &report); err != nil {
		return err
	}
	type pair struct {
		label         string
		floor, engine Result
	}
	var pairs []pair
	most := 0.0
	for _, r := range report.Results {
		most = max(most, r.PerSecond*flag01(r.Target != "direct"))
		switch r.Target {
		case "floor":
			pairs = append(pairs, pair{label: fmt.Sprintf("%s, %s token, %d ms, %d readers", r.Storage, r.Token, r.LatencyMS, r.Concurrency), floor: r})
		case "engine":
			pairs[len(pairs)-1].engine = r
		}
	}
	const left, width, row, bar = 250, 560, 34, 12
	height := 60 + row*len(pairs)
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="12">`+"\n", left+width+150, height)
	b.WriteString(`<rect width="100%" height="100%" fill="white"/>` + "\n")
	b.WriteString(`<text x="10" y="22" font-size="15">Reads per second: the engine beside an engine that does nothing (the floor)</text>` + "\n")
	fmt.Fprintf(&b, `<rect x="10" y="32" width="12" height="12" fill="#b8c4ce"/><text x="28" y="42">floor</text><rect x="80" y="32" width="12" height="12" fill="#2463a8"/><text x="98" y="42">engine, and its share of the floor</text>`+"\n")
	for i, p := range pairs {
		y := 56 + i*row
		fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="end">%s</text>`+"\n", left-8, y+bar+3, p.label)
		fmt.Fprintf(&b, `<rect x="%d" y="%d" width="%.0f" height="%d" fill="#b8c4ce"/><text x="%.0f" y="%d">%.0f</text>`+"\n",
			left, y, width*p.floor.PerSecond/most, bar, left+4+width*p.floor.PerSecond/most, y+bar-2, p.floor.PerSecond)
		fmt.Fprintf(&b, `<rect x="%d" y="%d" width="%.0f" height="%d" fill="#2463a8"/><text x="%.0f" y="%d">%.0f (%.2f)</text>`+"\n",
			left, y+bar, width*p.engine.PerSecond/most, bar, left+4+width*p.engine.PerSecond/most, y+2*bar-2, p.engine.PerSecond, p.engine.ToFloor)
	}
	b.WriteString("</svg>\n")
	return os.WriteFile(svgFile, []byte(b.String()), 0o600)
}

// flag01 is 1 for true.
func flag01(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
