// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// dashboard is the part of Grafana's JSON that is drawn.
type dashboard struct {
	Title  string  `json:"title"`
	Panels []panel `json:"panels"`
}

type panel struct {
	Type    string `json:"type"` // "row", "stat" or "timeseries"
	Title   string `json:"title"`
	GridPos struct {
		X, Y, W, H float64
	} `json:"gridPos"`
	Targets []struct {
		Expr         string `json:"expr"`
		LegendFormat string `json:"legendFormat"`
	} `json:"targets"`
	FieldConfig struct {
		Defaults struct {
			Unit     string `json:"unit"`
			Color    color  `json:"color"`
			Mappings []struct {
				Options map[string]struct{ Text, Color string } `json:"options"`
			} `json:"mappings"`
			Thresholds struct {
				Steps []struct {
					Color string   `json:"color"`
					Value *float64 `json:"value"` // nil for the lowest
				} `json:"steps"`
			} `json:"thresholds"`
			Custom struct {
				FillOpacity float64 `json:"fillOpacity"`
				Stacking    struct {
					Mode string `json:"mode"`
				} `json:"stacking"`
			} `json:"custom"`
		} `json:"defaults"`
		Overrides []struct {
			Matcher struct {
				Options string `json:"options"` // a series' name
			} `json:"matcher"`
			Properties []struct {
				ID    string          `json:"id"`
				Value json.RawMessage `json:"value"`
			} `json:"properties"`
		} `json:"overrides"`
	} `json:"fieldConfig"`
	Options struct {
		TextMode string `json:"textMode"`
	} `json:"options"`

	series []series // what Prometheus answered
}

type color struct {
	FixedColor string `json:"fixedColor"`
}

// series is one line of a panel: a value for each step of the window, NaN where
// there is none.
type series struct {
	name   string
	values []float64
}

// last returns the last value that there is, or NaN.
func (s series) last() float64 {
	for i := len(s.values) - 1; i >= 0; i-- {
		if !math.IsNaN(s.values[i]) {
			return s.values[i]
		}
	}
	return math.NaN()
}

// window is the time that is drawn.
type window struct {
	start, end time.Time
	step       time.Duration
}

// newWindow divides the time into some ninety steps of whole seconds: enough for
// a line, and few enough for a small file.
func newWindow(start, end time.Time) window {
	step := max(time.Second, (end.Sub(start) / 90).Round(time.Second))
	return window{start, end, step}
}

func (w window) steps() int { return int(w.end.Sub(w.start)/w.step) + 1 }

// readDashboard reads the panels, and refuses what it cannot draw.
func readDashboard(file string) (*dashboard, error) {
	raw, err := os.ReadFile(file) //nolint:gosec // G304: the file that a flag names, of whoever runs it
	if err != nil {
		return nil, err
	}
	d := new(dashboard)
	if err := json.Unmarshal(raw, d); err != nil {
		return nil, fmt.Errorf("reading %q: %w", file, err)
	}
	for _, p := range d.Panels {
		if p.Type != "row" && p.Type != "stat" && p.Type != "timeseries" {
			return nil, fmt.Errorf("panel %q is a %s, which cannot be drawn", p.Title, p.Type)
		}
	}
	return d, nil
}

// prometheus is the URL of a server's API.
type prometheus struct{ url string }

// waitForScrape waits until the mount was scraped, so that every counter is
// known from 0.
func (p prometheus) waitForScrape(ctx context.Context) error {
	for range 60 {
		var found struct{ Result []json.RawMessage }
		if err := p.get(ctx, "query", url.Values{"query": {"vault_cable_configured"}}, &found); err == nil && len(found.Result) > 0 {
			return nil
		}
		sleep(ctx, 500*time.Millisecond)
	}
	return errors.New("prometheus has no metrics of the mount after half a minute")
}

// fill asks for what the panel shows.
func (p prometheus) fill(ctx context.Context, to *panel, w window) error {
	// Grafana would take four scrapes, which is too restless for a scrape each second.
	variables := strings.NewReplacer("$mount", ".*", "$__rate_interval", "10s", "$__range", fmt.Sprintf("%.0fs", w.end.Sub(w.start).Seconds()))
	label := regexp.MustCompile(`\{\{(\w+)\}\}`)
	for _, t := range to.Targets {
		var found struct {
			Result []struct {
				Metric map[string]string `json:"metric"`
				Values [][2]any          `json:"values"` // time, and value as text
			} `json:"result"`
		}
		if err := p.get(ctx, "query_range", url.Values{
			"query": {variables.Replace(t.Expr)},
			"start": {strconv.FormatInt(w.start.Unix(), 10)},
			"end":   {strconv.FormatInt(w.end.Unix(), 10)},
			"step":  {strconv.FormatFloat(w.step.Seconds(), 'f', -1, 64)},
		}, &found); err != nil {
			return err
		}
		for _, r := range found.Result {
			s := series{values: make([]float64, w.steps())}
			s.name = label.ReplaceAllStringFunc(t.LegendFormat, func(m string) string { return r.Metric[strings.Trim(m, "{}")] })
			for i := range s.values {
				s.values[i] = math.NaN()
			}
			for _, v := range r.Values {
				at, _ := v[0].(float64)
				text, _ := v[1].(string)
				i := int(math.Round((at - float64(w.start.Unix())) / w.step.Seconds()))
				value, err := strconv.ParseFloat(text, 64)
				if err != nil || i < 0 || i >= len(s.values) {
					return fmt.Errorf("the value %v is none of the window's", v)
				}
				s.values[i] = value
			}
			to.series = append(to.series, s)
		}
	}
	if len(to.Targets) > 0 && len(to.series) == 0 {
		return errors.New("there is nothing to draw")
	}
	return nil
}

// get reads the data of an answer of the API.
func (p prometheus) get(ctx context.Context, path string, query url.Values, data any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.url+"/api/v1/"+path+"?"+query.Encode(), nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	answer := struct {
		Status string `json:"status"`
		Error  string `json:"error"`
		Data   any    `json:"data"`
	}{Data: data}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return fmt.Errorf("prometheus answered %s: %w", resp.Status, err)
	}
	if answer.Status != "success" {
		return fmt.Errorf("prometheus: %s", answer.Error)
	}
	return nil
}
