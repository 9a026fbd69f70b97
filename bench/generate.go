//go:build linux

package main

import (
	"encoding/binary"
	"io"
	"math/rand/v2"
)

// words make the text-like half of the data.
var words = []string{
	"the", "backup", "of", "a", "machine", "is", "written", "block", "by", "and", "restored", "when", "somebody",
	"asks", "for", "it", "error", "warning", "info", "connection", "from", "user", "logged", "in", "at", "value",
	"index", "commit", "table", "select", "where", "transaction", "mailbox", "message", "received", "queue",
}

// random writes n bytes that do not compress.
func random(w io.Writer, n, seed int64) error {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], uint64(seed))
	_, err := io.CopyN(w, rand.NewChaCha8(key), n)
	return err
}

// text writes n bytes of lines that look like a log; no MiB repeats another.
func text(w io.Writer, n, seed int64) error {
	rnd := rand.New(rand.NewPCG(uint64(seed), 77))
	buf := make([]byte, 0, 1<<20+4096)
	for line := int64(0); n > 0; {
		buf = buf[:0]
		for len(buf) < 1<<20 {
			buf = appendLine(buf, rnd, line)
			line++
		}
		k := min(n, int64(len(buf)))
		if _, err := w.Write(buf[:k]); err != nil {
			return err
		}
		n -= k
	}
	return nil
}

func appendLine(buf []byte, rnd *rand.Rand, line int64) []byte {
	const hex = "0123456789abcdef"
	v := uint64(line)*0x9e3779b97f4a7c15 ^ rnd.Uint64()
	for range 10 { // an identifier that does not compress well, as logs have them
		buf = append(buf, hex[v&15])
		v >>= 4
	}
	for range 6 + rnd.IntN(8) {
		buf = append(buf, ' ')
		buf = append(buf, words[rnd.IntN(len(words))]...)
	}
	return append(buf, '\n')
}
