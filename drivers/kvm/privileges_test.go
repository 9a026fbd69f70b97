package kvm

import (
	"go/ast"
	"go/parser"
	gotoken "go/token"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestPrivilegesAreDocumented: every call to the daemon has its permission in the
// table of least privileges, and the table names no call that is gone.
func TestPrivilegesAreDocumented(t *testing.T) {
	f, err := parser.ParseFile(gotoken.NewFileSet(), "conn.go", nil, 0)
	require.NoError(t, err)
	calls := map[string]bool{}
	ast.Inspect(f, func(n ast.Node) bool {
		spec, ok := n.(*ast.TypeSpec)
		if !ok || spec.Name.Name != "conn" {
			return true
		}
		for _, m := range spec.Type.(*ast.InterfaceType).Methods.List {
			calls[m.Names[0].Name] = false
		}
		return false
	})
	delete(calls, "leaf")
	delete(calls, "close")
	require.Greater(t, len(calls), 20)

	text, err := os.ReadFile("../../docs/platforms/kvm.md")
	require.NoError(t, err)
	_, table, ok := strings.Cut(string(text), "| the driver's call |")
	require.True(t, ok)
	table, _, _ = strings.Cut(table, "\n\n")
	for row := range strings.Lines(table) {
		cells := strings.Split(row, "|")
		if !strings.HasPrefix(row, "| `") {
			continue
		}
		require.Len(t, cells, 6, row)
		require.Contains(t, cells[3], ":", row)
		for name := range strings.SplitSeq(strings.TrimSpace(cells[1]), ", ") {
			name = strings.Trim(name, "`")
			_, known := calls[name]
			require.True(t, known, "%s is no call", name)
			calls[name] = true
		}
	}
	for name, documented := range calls {
		require.True(t, documented, "the permission of %s is not documented", name)
	}
}
