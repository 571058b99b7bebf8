// Package plan runs a policy that OPA has planned: it compiles OPA's intermediate
// representation (v1/ir) to Go closures, and answers what topdown answers.
//
// In the common case Of has OPA plan one query over a compiled policy, Compile
// makes a Program of the plan and the data, and Eval asks it for one input. A
// Program never changes and is asked by any number of goroutines at once.
//
// # How a plan becomes closures
//
// Each statement is a closure that says where to go on: with the next one, after
// the block, so many blocks further out, or at the end of the function. The locals
// of a function are slots of a frame, cut from the stack of a machine; a machine
// runs one evaluation at a time and is then used for the next, so that frames,
// operands and what is remembered cost no allocation. Values are *ast.Term
// throughout, nil where undefined: constants, what is found in input and data, and
// the results of builtins are passed on as they are.
//
// Locals that have only one value, such as numbers and literals of constants, are
// known when the Program is compiled and have no slot. A walk along several keys,
// and the comparison of what it finds, are one step. In a rule of many, a test of
// one part of the input against constants becomes a lookup that says which of the
// rules can hold (index.go). Where all rules give the same constant, the first one
// that holds ends the function, as it does in topdown. Builtins are those of OPA's
// registry; a few have a native form for the cases that are plain successes
// (native.go). Tokens are verified here too, with keys that are parsed once
// (token.go); a signature that is not good is left to the registry to refuse.
//
// # Data where they lie
//
// The data are a document (package document), of which the terms of OPA would take many
// times the memory. Its values are looked at where they lie: a walk along keys makes
// no term but of what it comes to, and that may be a term which only holds a value of the document,
// where each statement that reads the local is one that knows of such (holds.go). All
// else is made as OPA has it: who does not know of held values cannot meet one. Small
// values are always made so, for a document remembers those that are asked for often.
//
// # Searches in data
//
// In a scan of a list or object of the data, an element has no effect where what the
// block begins with does not hold: that something in the element, or anything in a
// list in it, equals a value that is the same for all elements (guard.go). After a
// few scans there is an index of what all elements have there (dataindex.go), and
// only those that may be equal are looked at, in their order, by the block as it
// is. An index knows strings, numbers, booleans and null; where the value is none of
// these, or a number with an exponent or of more than maxPlain characters, all
// elements are looked at. "x in list" takes the same way. Indexes belong to the
// Program: at most maxIndexed, in at most maxIndexBytes, which Size reckons with.
//
// # What is remembered, and what is known before
//
// Within an evaluation, the value of a rule is remembered for the input and data
// that it was found for, "with" or not; that of a function, after its first calls,
// for its arguments too. Over evaluations, a Program keeps the values of rules that
// look at data alone, from when they are first asked for, within bounds (maxKept,
// maxKeptAll), the patterns of glob.match (maxPatterns), the keys of tokens
// (maxKeySets, maxKeySetBytes) and the headers of tokens that were good (maxHeaders),
// never a token. What time, chance, a
// cache, the labels of a tenant or an earlier answer can change is never kept.
//
// # How an evaluation ends early
//
// Each call of a function or builtin, and each element that is looked at, is a
// step. Every few steps the evaluation asks whether it was cancelled, and whether
// it has had more than Env.MaxSteps. What it builds is reckoned with as it is added
// to an array, object, set or text, against Env.MaxMemory; a builtin whose result
// could not fit into what is left is not called (memory.go). Both bounds end the
// evaluation with ErrBound. After a builtin that waits for something, it
// asks at once, for what such a builtin gives when it is cancelled is no answer.
//
// # What topdown has of this
//
// The registry of builtins is the process's, and topdown calls what is in it. So this
// package registers some in the place of OPA's (registry.go): those that may build much
// end both evaluators' evaluations where one call would build more than MaxBuilt, and
// those that OPA runs to their end though there is no end to what they build, such as
// graph.reachable_paths, look at the cancellation.
//
// # What falls back
//
// A Program must be right. Of and Compile therefore refuse, with ErrUnsupported or
// the error of OPA's planner, what would not be answered as topdown does, and the
// caller has topdown: plans that would be immense (maxReplacing, maxCopies), rules
// with constants in their names that are no strings, computed keys of data where a
// "with" replaces data, negated searches that a plan cannot negate, arrays of what
// is found in [x | some x in {a, b}], which topdown takes in the order of the names
// of a and b.
//
// A rule with keys that are indexes of an array of data, or keys of an object that
// are texts of digits, as in p[i] := data.list[i], has for topdown a member "0" where
// a rule asks for p["0"], and none where it asks for all of p. Such a question is
// refused too: by Compile where the key is a constant, and otherwise by an evaluation
// that comes to it, whose error wraps ErrUnsupported (keys.go).
//
// An evaluation may end with a conflict where topdown does not look at the rules
// that conflict; who wants topdown's word on errors asks it again.
package plan
