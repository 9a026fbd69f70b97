package main

import (
	"fmt"
	"strings"
	"time"
	"unicode/utf8"
)

// bytesText is a size for a person, in binary units.
func bytesText(n int64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	v, unit := float64(n)/1024, 0
	for ; v >= 1023.95 && unit < 5; unit++ {
		v /= 1024
	}
	return fmt.Sprintf("%.1f %ciB", v, "KMGTPE"[unit])
}

// durationText is a duration for a person.
func durationText(d time.Duration) string {
	switch {
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	case d < time.Minute:
		return fmt.Sprintf("%.1f s", d.Seconds())
	}
	return d.Round(time.Second).String()
}

// rateText is bytes per time for a person, empty when nothing can be said.
func rateText(n int64, d time.Duration) string {
	if n <= 0 || d <= 0 {
		return ""
	}
	return bytesText(int64(float64(n)/d.Seconds())) + "/s"
}

// share is part of whole for a person.
func share(part, whole int64) string {
	if whole <= 0 {
		return "0 %"
	}
	v := 100 * float64(part) / float64(whole)
	if v < 10 && v > 0 {
		return fmt.Sprintf("%.1f %%", v)
	}
	return fmt.Sprintf("%.0f %%", v)
}

// plural is a number with its noun.
func plural(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

// table lays rows out in columns; those in right are aligned to the right.
type table struct {
	indent string
	right  map[int]bool
	rows   [][]string
}

func (t *table) add(cells ...string) { t.rows = append(t.rows, cells) }

// print hands the rows out line by line.
func (t *table) print(say func(format string, args ...any)) {
	var width []int
	for _, r := range t.rows {
		for i, c := range r {
			if i == len(width) {
				width = append(width, 0)
			}
			width[i] = max(width[i], utf8.RuneCountInString(c))
		}
	}
	for _, r := range t.rows {
		var b strings.Builder
		b.WriteString(t.indent)
		for i, c := range r {
			pad := strings.Repeat(" ", width[i]-utf8.RuneCountInString(c))
			if t.right[i] {
				c = pad + c
			} else {
				c += pad
			}
			if i > 0 {
				b.WriteString("  ")
			}
			b.WriteString(c)
		}
		say("%s", strings.TrimRight(b.String(), " "))
	}
}

// printable replaces what a terminal would obey, but for the end of a line: names
// and messages come from elsewhere.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' && r != '\n' || r == 0x7f || r >= 0x80 && r < 0xa0 {
			return '?'
		}
		return r
	}, s)
}
