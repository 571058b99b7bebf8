package document

import (
	"crypto/sha256"
	"encoding/binary"
	"hash/maphash"
	"runtime"
	"sync"
	"weak"
)

// The kinds of a slot, in its three highest bits. The others say what or where the
// value is.
const (
	slotLiteral uint32 = iota << slotShift
	slotInt            // an integer as strconv.Itoa writes it, the sign in the lowest bit
	slotString
	slotNumber // any other number
	slotArray
	slotObject
	slotLink // to another block
	slotBig  // an object or array that is cut

	slotShift = 29
	slotMask  = 1<<slotShift - 1
)

// The literals.
const (
	literalNull = slotLiteral + iota
	literalFalse
	literalTrue
	literalArray  // []
	literalObject // {}
)

// block is part of a document. See record.go for what is in data.
type block struct {
	data   string
	links  []link
	root   uint32 // the slot of its value
	digest [sha256.Size]byte

	terms memory
}

// link is a value of another block.
type link struct {
	to   *block
	slot uint32
}

// sizeBlock estimates what a block takes beside its data, in bytes: itself, and its
// place among the blocks in use.
const sizeBlock = 300

// size is what the block takes without what is remembered, in bytes.
func (b *block) size() int64 { return sizeBlock + int64(len(b.data)) + 16*int64(len(b.links)) }

// seed is that of the indexes by hash. They are made and used in one process.
var seed = maphash.MakeSeed()

func hashOf(key string) uint32 { return uint32(maphash.String(seed, key)) }

// newBlock returns the block in use that is equal to this one, or makes it one. It
// adds so many bytes to the room for small terms then.
func newBlock(data []byte, links []link, root uint32, room *room, more int64) *block {
	h := sha256.New()
	var word [8]byte
	binary.LittleEndian.PutUint32(word[:], root)
	binary.LittleEndian.PutUint32(word[4:], uint32(len(links)))
	h.Write(word[:])
	for _, l := range links {
		h.Write(l.to.digest[:])
		binary.LittleEndian.PutUint64(word[:], uint64(l.slot))
		h.Write(word[:])
	}
	h.Write(data)
	digest := [sha256.Size]byte(h.Sum(nil))

	blocks.Lock()
	defer blocks.Unlock()
	if b := blocks.byDigest[digest].Value(); b != nil {
		return b
	}
	b := &block{data: string(data), links: append([]link(nil), links...), root: root, digest: digest}
	b.terms.room = room
	room.most.Add(more)
	blocks.byDigest[digest] = weak.Make(b)
	runtime.AddCleanup(b, forget, digest)
	return b
}

// blocks are those in use. They are held by the documents, not from here.
var blocks = struct {
	sync.Mutex
	byDigest map[[sha256.Size]byte]weak.Pointer[block] // guarded by Mutex
}{byDigest: map[[sha256.Size]byte]weak.Pointer[block]{}}

// forget drops a digest, unless there is a new block with it by now.
func forget(digest [sha256.Size]byte) {
	blocks.Lock()
	defer blocks.Unlock()
	if blocks.byDigest[digest].Value() == nil {
		delete(blocks.byDigest, digest)
	}
}
