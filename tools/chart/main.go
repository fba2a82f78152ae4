// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

// Command chart draws CSV from standard input as SVG on standard output. The
// first row has the names; each column but the first is a series. The first
// column has the labels of bars or, with -lines, the x values.
//
//	go run -C tools/chart . -title 'Reads per second' < bench.csv > docs/performance.svg
package main

import (
	"bytes"
	"encoding/csv"
	"flag"
	"image/color"
	"log"
	"os"
	"slices"
	"strconv"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
)

var colors = []color.Color{
	color.RGBA{0xb8, 0xc4, 0xce, 0xff}, color.RGBA{0x24, 0x63, 0xa8, 0xff}, color.RGBA{0xd9, 0x82, 0x2b, 0xff}, color.RGBA{0x3d, 0x8b, 0x57, 0xff},
}

func main() {
	title := flag.String("title", "", "title")
	lines := flag.Bool("lines", false, "draw lines instead of bars")
	logs := flag.Bool("log", false, "with -lines: logarithmic axes")
	flag.Parse()
	rows, err := csv.NewReader(os.Stdin).ReadAll()
	if err != nil || len(rows) < 2 {
		log.Fatalf("want CSV with a row of names and at least one of values: %v", err)
	}
	plot.DefaultFont.Variant = "Sans"
	p := plot.New()
	p.Title.Text = *title
	p.Legend.Top, p.Legend.Left = *lines, *lines
	if *logs {
		p.X.Scale, p.X.Tick.Marker = plot.LogScale{}, plot.LogTicks{}
		p.Y.Scale, p.Y.Tick.Marker = plot.LogScale{}, plot.LogTicks{}
	}
	draw := bars
	if *lines {
		draw = curves
	}
	width, height, err := draw(p, rows[0], rows[1:])
	if err != nil {
		log.Fatal(err)
	}
	var svg bytes.Buffer
	w, err := p.WriterTo(width, height, "svg")
	if err == nil {
		_, err = w.WriteTo(&svg)
	}
	if err != nil {
		log.Fatal(err)
	}
	// Readers may not have the font.
	_, _ = os.Stdout.Write(bytes.ReplaceAll(svg.Bytes(), []byte("Liberation Sans"), []byte("Liberation Sans, Arial, sans-serif")))
}

// bars draws a group of horizontal bars for each row, the first row on top.
func bars(p *plot.Plot, names []string, rows [][]string) (width, height vg.Length, err error) {
	const bar = vg.Length(9)
	slices.Reverse(rows)
	var labels []string
	for _, row := range rows {
		labels = append(labels, row[0])
	}
	series := vg.Length(len(names) - 1)
	for i, name := range names[1:] {
		values := make(plotter.Values, len(rows))
		for j, row := range rows {
			if values[j], err = strconv.ParseFloat(row[i+1], 64); err != nil {
				return 0, 0, err
			}
		}
		chart, err := plotter.NewBarChart(values, bar)
		if err != nil {
			return 0, 0, err
		}
		chart.Horizontal, chart.Color, chart.LineStyle.Width = true, colors[i%len(colors)], 0
		chart.Offset = bar * ((series-1)/2 - vg.Length(i))
		p.Add(chart)
		p.Legend.Add(name, chart)
	}
	p.NominalY(labels...)
	p.X.Max *= 1.05
	return 620, 80 + vg.Length(len(rows))*(series*bar+6), nil
}

// curves draws a line for each series.
func curves(p *plot.Plot, names []string, rows [][]string) (width, height vg.Length, err error) {
	p.X.Label.Text = names[0]
	p.Add(plotter.NewGrid())
	for i, name := range names[1:] {
		points := make(plotter.XYs, len(rows))
		for j, row := range rows {
			if points[j].X, err = strconv.ParseFloat(row[0], 64); err != nil {
				return 0, 0, err
			}
			if points[j].Y, err = strconv.ParseFloat(row[i+1], 64); err != nil {
				return 0, 0, err
			}
		}
		line, err := plotter.NewLine(points)
		if err != nil {
			return 0, 0, err
		}
		line.Color, line.Width = colors[(i+1)%len(colors)], 1.5
		p.Add(line)
		p.Legend.Add(name, line)
	}
	return 620, 320, nil
}
