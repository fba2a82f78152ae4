// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"cmp"
	"fmt"
	"go/ast"
	"go/token"
	"go/types"
	"slices"
	"strings"
)

// mutant is a fault that the environment variable MUTANT switches on by its number.
type mutant struct {
	number int
	line   int
	name   string // file, function, change and source line, without its number, which unrelated edits change
}

// helpers is a file of the package, with the functions that the mutants call.
const helpers = `package %s

import (
	"cmp"
	"os"
	"strconv"
)

var mutant, _ = strconv.Atoi(os.Getenv("MUTANT"))

func mutantIs(number int) bool { return number == mutant }

func mutantBound[T cmp.Ordered](number int, op string, a, b T) bool {
	return op[0] == '<' && a < b || op[0] == '>' && a > b || a == b && (len(op) == 2) != mutantIs(number)
}

func mutantMath[T ~int | ~int32 | ~int64 | ~uint32 | ~uint64](number int, op string, a, b T) T {
	if mutantIs(number) {
		op = map[string]string{"+": "-", "-": "+", "*": "/", "/": "*", "%%": "*"}[op]
	}
	switch op {
	case "+":
		return a + b
	case "-":
		return a - b
	case "*":
		return a * b
	case "/":
		return a / b
	}
	return a %% b
}
`

// mutator writes the mutants of a file into it.
type mutator struct {
	path    string
	source  []byte
	set     *token.FileSet
	info    *types.Info
	fn      string            // that is being visited
	done    map[ast.Expr]bool // conditions that have their mutants
	edits   []edit
	mutants []mutant
	before  int // mutants in the files before
}

// edit is text in place of some bytes. At the same offset, the end of a mutant comes before the beginning of another.
type edit struct {
	offset, order, length int
	text                  string
}

// mutate returns the mutants of a file, and the file with them. The first has the number that follows before.
func mutate(path string, source []byte, set *token.FileSet, tree *ast.File, info *types.Info, before int) (
	[]mutant, []byte,
) {
	m := &mutator{path: path, source: source, set: set, info: info, done: make(map[ast.Expr]bool), before: before}
	for _, decl := range tree.Decls {
		m.fn = "-"
		if fn, ok := decl.(*ast.FuncDecl); ok {
			m.fn = fn.Name.Name
		}
		ast.Inspect(decl, m.visit)
	}
	slices.SortStableFunc(m.edits, func(a, b edit) int {
		return cmp.Or(a.offset-b.offset, a.order-b.order)
	})
	var out []byte
	kept := 0
	for _, e := range m.edits {
		out = append(append(out, source[kept:e.offset]...), e.text...)
		kept = e.offset + e.length
	}
	return m.mutants, append(out, source[kept:]...)
}

func (m *mutator) offset(pos token.Pos) int { return m.set.Position(pos).Offset }

func (m *mutator) original(n ast.Node) string {
	return string(m.source[m.offset(n.Pos()):m.offset(n.End())])
}

// add adds the mutant that stands between begin, in which # is its number, and end, around a node.
func (m *mutator) add(change string, n ast.Node, begin, end string) {
	number := m.before + len(m.mutants) + 1
	line := m.set.Position(n.Pos()).Line
	text := strings.TrimSpace(strings.Split(string(m.source), "\n")[line-1])
	m.mutants = append(m.mutants, mutant{number, line, fmt.Sprintf("%s %s, %s: %s", m.path, m.fn, change, text)})
	begin = strings.Replace(begin, "#", fmt.Sprint(number), 1)
	m.edits = append(m.edits, edit{offset: m.offset(n.Pos()), order: number, text: begin},
		edit{offset: m.offset(n.End()), order: -number, text: end})
}

// visit adds the mutants of a node.
func (m *mutator) visit(n ast.Node) bool {
	switch n := n.(type) {
	case *ast.GenDecl:
		return n.Tok == token.VAR
	case *ast.IfStmt:
		m.condition(n.Cond, "true", "false")
	case *ast.ForStmt:
		m.condition(n.Cond, "false") // true would not end
	case *ast.SwitchStmt:
		for _, clause := range n.Body.List {
			for _, e := range clause.(*ast.CaseClause).List {
				if n.Tag == nil {
					m.condition(e, "true", "false")
				}
			}
		}
	case *ast.UnaryExpr:
		if n.Op == token.NOT {
			m.condition(n, "true", "false")
		}
	case *ast.BinaryExpr:
		if m.info.Types[n].Value == nil { // no constant
			m.binary(n)
		}
	case *ast.Ident:
		if (n.Name == "true" || n.Name == "false") && m.info.Types[n].Value != nil {
			m.add(n.Name+" is not", n, "(mutantIs(#) != ", ")")
		}
	case *ast.BlockStmt:
		m.statements(n.List)
	case *ast.CaseClause:
		m.statements(n.Body)
	case *ast.CommClause:
		m.statements(n.Body)
	}
	return true
}

// binary adds the mutants of an expression with an operator, those of its operands excepted.
func (m *mutator) binary(n *ast.BinaryExpr) {
	op := n.Op.String()
	function := ""
	switch n.Op.Precedence() {
	case token.LOR.Precedence(), token.LAND.Precedence(), token.EQL.Precedence():
		m.condition(n, "true", "false")
		if strings.ContainsAny(op, "<>") {
			function = "mutantBound"
		}
	default:
		basic, isBasic := m.info.TypeOf(n).Underlying().(*types.Basic)
		arithmetic := []token.Token{token.ADD, token.SUB, token.MUL, token.QUO, token.REM}
		if isBasic && basic.Info()&types.IsInteger != 0 && slices.Contains(arithmetic, n.Op) {
			function = "mutantMath"
		}
	}
	if function != "" {
		m.add(op+" is another", n, function+`(#, "`+op+`", `, ")")
		m.edits = append(m.edits, edit{offset: m.offset(n.OpPos), length: len(op), text: ","})
	}
}

// condition adds the mutants in which a condition has one of the values, and those of its operands.
func (m *mutator) condition(e ast.Expr, values ...string) {
	if e == nil || m.done[e] {
		return
	}
	m.done[e] = true
	text := strings.Join(strings.Fields(m.original(e)), " ")
	for _, value := range values {
		begin := map[string]string{"true": "(mutantIs(#) || (", "false": "(!mutantIs(#) && ("}[value]
		m.add(text+" is "+value, e, begin, "))")
	}
	switch e := ast.Unparen(e).(type) {
	case *ast.UnaryExpr:
		m.condition(e.X)
	case *ast.BinaryExpr:
		m.done[e] = true
		neutral := map[token.Token]string{token.LAND: "true", token.LOR: "false"}[e.Op]
		if neutral != "" { // with which the other operand decides
			m.condition(e.X, neutral)
			m.condition(e.Y, neutral)
		}
	}
}

// statements adds the mutants in which one of the statements is missing.
func (m *mutator) statements(list []ast.Stmt) {
	for _, s := range list {
		text := m.original(s)
		switch s := s.(type) {
		case *ast.ExprStmt, *ast.DeferStmt, *ast.GoStmt, *ast.SendStmt, *ast.IncDecStmt:
			if strings.HasSuffix(text, "ock()") || strings.HasPrefix(text, "panic(") {
				continue // Lock and Unlock
			}
		case *ast.AssignStmt:
			if s.Tok == token.DEFINE {
				continue
			}
		case *ast.ReturnStmt:
			if s.Results != nil {
				continue
			}
		case *ast.BranchStmt:
			if s.Tok == token.FALLTHROUGH {
				continue
			}
		default:
			continue
		}
		m.add("missing", s, "if !mutantIs(#) { ", " }")
	}
}
