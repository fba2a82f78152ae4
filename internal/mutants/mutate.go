// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"slices"
	"strconv"
	"strings"
)

// mutant is a file with one fault. Its name has the file, the function, the change and the line of source, but not the
// line's number, which unrelated edits change.
type mutant struct {
	name   string
	file   string
	line   int
	text   string // in place of the original
	source []byte // of the whole file
}

// mutator makes the mutants of a file.
type mutator struct {
	file    string
	source  []byte
	set     *token.FileSet
	fn      string            // that is being visited
	done    map[ast.Expr]bool // conditions whose mutants have been made
	mutants []mutant
}

// mutate returns the mutants of a file.
func mutate(file string, source []byte) ([]mutant, error) {
	m := &mutator{file: file, source: source, set: token.NewFileSet(), done: make(map[ast.Expr]bool)}
	tree, err := parser.ParseFile(m.set, file, source, parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	for _, decl := range tree.Decls {
		m.fn = "-"
		if fn, ok := decl.(*ast.FuncDecl); ok {
			m.fn = fn.Name.Name
		}
		ast.Inspect(decl, m.visit)
	}
	return m.mutants, nil
}

// original returns the source of a node.
func (m *mutator) original(n ast.Node) string {
	return string(m.source[m.set.Position(n.Pos()).Offset:m.set.Position(n.End()).Offset])
}

// add adds the mutant in which text stands in place of the source between two positions.
func (m *mutator) add(change string, from, to token.Pos, text string) {
	at, end := m.set.Position(from), m.set.Position(to)
	line := strings.Split(string(m.source), "\n")[at.Line-1]
	m.mutants = append(m.mutants, mutant{
		name:   fmt.Sprintf("%s %s, %s: %s", m.file, m.fn, change, strings.TrimSpace(line)),
		file:   m.file,
		line:   at.Line,
		text:   text,
		source: slices.Concat(m.source[:at.Offset], []byte(text), m.source[end.Offset:]),
	})
}

// operators has the operators that stand for another.
var operators = map[token.Token]string{
	token.ADD: "-", token.SUB: "+", token.MUL: "/", token.QUO: "*", token.REM: "*", token.SHL: ">>", token.SHR: "<<",
	token.LSS: "<=", token.LEQ: "<", token.GTR: ">=", token.GEQ: ">",
}

// visit adds the mutants of a node.
func (m *mutator) visit(n ast.Node) bool {
	switch n := n.(type) {
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
		if p := n.Op.Precedence(); p <= token.EQL.Precedence() { // of a condition
			m.condition(n, "true", "false")
		}
		if to, ok := operators[n.Op]; ok && !strings.ContainsAny(m.original(n), "\"`") {
			m.add(n.Op.String()+" is "+to, n.OpPos, n.OpPos+token.Pos(len(n.Op.String())), to)
		}
	case *ast.BasicLit:
		// 0 remains, because the operator of a bound at 0 moves it, and a 0 next to an error promises nothing.
		if i, err := strconv.ParseInt(n.Value, 0, 63); n.Kind == token.INT && err == nil && i > 0 {
			m.add(n.Value+" is one more", n.Pos(), n.End(), strconv.FormatInt(i+1, 10))
		}
	case *ast.Ident:
		if i := slices.Index([]string{"true", "false"}, n.Name); i >= 0 {
			m.add(n.Name+" is not", n.Pos(), n.End(), []string{"false", "true"}[i])
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

// condition adds the mutants in which a condition has one of the values, and those of its operands. The value stands
// before the condition, whose variables so remain in use.
func (m *mutator) condition(e ast.Expr, values ...string) {
	if e == nil || m.done[e] {
		return
	}
	m.done[e] = true
	short := map[string]string{"true": "||", "false": "&&"} // the operator after a value that decides
	for _, value := range values {
		change := strings.Join(strings.Fields(m.original(e)), " ") + " is " + value
		m.add(change, e.Pos(), e.End(), fmt.Sprintf("(%s %s (%s))", value, short[value], m.original(e)))
	}
	switch e := ast.Unparen(e).(type) {
	case *ast.UnaryExpr:
		m.condition(e.X)
	case *ast.BinaryExpr:
		m.done[e] = true
		for value, op := range short {
			if e.Op.String() == op {
				value = map[string]string{"true": "false", "false": "true"}[value] // with which the other one decides
				m.condition(e.X, value)
				m.condition(e.Y, value)
			}
		}
	}
}

// statements adds the mutants in which one of the statements is missing. Of an assignment the right side remains.
func (m *mutator) statements(list []ast.Stmt) {
	for _, s := range list {
		switch s := s.(type) {
		case *ast.ExprStmt, *ast.DeferStmt:
			if !strings.HasSuffix(m.original(s), "ock()") { // Lock or Unlock
				m.add("missing", s.Pos(), s.End(), "")
			}
		case *ast.IncDecStmt, *ast.BranchStmt, *ast.SendStmt:
			m.add("missing", s.Pos(), s.End(), "")
		case *ast.ReturnStmt:
			if s.Results == nil {
				m.add("missing", s.Pos(), s.End(), "")
			}
		case *ast.AssignStmt:
			for _, left := range s.Lhs {
				if s.Tok == token.ASSIGN && m.original(left) != "_" {
					m.add(m.original(left)+" is not assigned", left.Pos(), left.End(), "_")
				}
			}
			if s.Tok != token.ASSIGN && s.Tok != token.DEFINE {
				m.add("missing", s.Pos(), s.Rhs[0].Pos(), "_ = ")
			}
		}
	}
}
