package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"unicode/utf16"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

// table prints rows in columns as wide as their widest cell.
type table struct{ rows [][]string }

func (t *table) row(cells ...string) { t.rows = append(t.rows, cells) }

// line is a row of a key and its value, unless that is empty.
func (t *table) line(key, value string) {
	if value != "" {
		t.row(key+":", value)
	}
}

func (t *table) write(w io.Writer) error {
	var widths []int
	for _, row := range t.rows {
		for i, cell := range row {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			row[i] = cleanLine(cell)
			widths[i] = max(widths[i], utf8.RuneCountInString(row[i]))
		}
	}
	var b strings.Builder
	for _, row := range t.rows {
		var line strings.Builder
		for i, cell := range row {
			fmt.Fprintf(&line, "%-*s", widths[i]+2, cell)
		}
		b.WriteString(strings.TrimRight(line.String(), " ") + "\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// printTable prints to stdout, on a terminal with the header in bold.
func (a *app) printTable(t *table) error {
	if !a.colour() {
		return t.write(a.stdout)
	}
	var b bytes.Buffer
	if err := t.write(&b); err != nil {
		return err
	}
	header, rest, _ := bytes.Cut(b.Bytes(), []byte("\n"))
	_, err := fmt.Fprintf(a.stdout, "\x1b[1m%s\x1b[0m\n%s", header, rest)
	return err
}

// colour tells whether stdout takes colours; see https://no-color.org.
func (a *app) colour() bool {
	return !a.noColor && a.env.get("NO_COLOR") == "" && a.env.get("TERM") != "dumb" && isTerminal(a.stdout)
}

// printJSON prints a message of the API under the names of its fields in the .proto
// file, with sizes as strings, as the API itself does in JSON.
func (a *app) printJSON(m proto.Message) error {
	b, err := marshal(m)
	if err != nil {
		return err
	}
	return a.printIndented(b)
}

// printJSONList prints an array, also of none.
func printJSONList[M proto.Message](a *app, list []M) error {
	parts := make([][]byte, len(list))
	for i, m := range list {
		var err error
		if parts[i], err = marshal(m); err != nil {
			return err
		}
	}
	return a.printIndented(append(append([]byte{'['}, bytes.Join(parts, []byte{','})...), ']'))
}

func marshal(m proto.Message) ([]byte, error) {
	return protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true}.Marshal(m)
}

// printIndented also evens out the random spaces that protojson puts in.
func (a *app) printIndented(b []byte) error {
	var out bytes.Buffer
	if err := json.Indent(&out, b, "", "  "); err != nil {
		return err
	}
	out.WriteByte('\n')
	_, err := io.WriteString(a.stdout, cleanJSON(out.String()))
	return err
}

// cleanJSON is clean for JSON, where the same runes have an escape of their own. All
// of them lie within strings: JSON has no other place for them.
func cleanJSON(s string) string {
	if strings.IndexFunc(s, harmful) < 0 {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		if !harmful(r) {
			b.WriteRune(r)
			continue
		}
		for _, unit := range utf16.Encode([]rune{r}) {
			fmt.Fprintf(&b, `\u%04x`, unit)
		}
	}
	return b.String()
}
