// Package document holds JSON documents in little memory: immutable, read in place,
// and as ast.Value where somebody wants one.
//
// In the common case Of takes what OPA decoded of the data of a bundle, and a
// Document stands for it: Root gives its Value, of which Member, Elem and All
// give others. A Value is two words and costs no allocation. Term makes a term of it,
// of OPA's own types, and a Document remembers some of these, so that what is read
// often is made once.
//
// # How it is held
//
// A document is a tree of blocks. A block is one string, which the garbage collector
// has nothing to look for in, and links to other blocks. In it each text stands
// once, each object or array that is equal to another stands once, and objects with
// the same keys have these in common. A value is four bytes: its kind, with what it
// is, or where it is in the block.
//
// Arrays are their values, one after the other. Objects are the place of their keys
// and their values in the order of the keys, which is that of OPA. Up to eight keys
// are looked through; more have an index by hash beside them, some bytes for each.
//
// What is larger than minBlock is a block of its own, and what is larger than
// maxBlock is cut into several, with a directory before them. Where it is cut depends
// on the keys that are there, so that a document that differs in little from another
// has most blocks in common with it.
//
// # What is shared
//
// Two blocks that are equal are one, in the whole process, whichever documents they
// are of: the blocks in use are found by their digest. What no document uses is
// collected.
//
// # What is remembered
//
// Terms that were made of values of a block are remembered with it. The small ones, for
// so long as there is room: a document takes, with what it remembers of small terms, at
// most perJSON times the length of its JSON, or leastRoom. Where that is not enough for
// all that is asked for, those that are asked for often stay, and the others are made again. Large terms, of largeTerm and more, always: to
// make them takes long. All of them together are at most what the document takes as an
// ast.Value. Size counts both.
package document
