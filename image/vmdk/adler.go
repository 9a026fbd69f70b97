package vmdk

import "encoding/binary"

const (
	adlerPrime = 65521
	adlerBlock = 128

	evenBytes = 0x00ff00ff00ff00ff
	evenLanes = 0x0000ffff0000ffff
)

// sum32 is Adler-32, the checksum of RFC 1950. It takes sixteen words of eight bytes at a time, in
// lanes of 16 bits: one byte at a time it would be a third of what a decoder does.
func sum32(p []byte) uint32 {
	a, b := uint64(1), uint64(0)
	for ; len(p) >= adlerBlock; p = p[adlerBlock:] {
		// s is the sum of the words so far, at most 16*255 a lane; t is the sum of s before each word,
		// at most 120*255 a lane.
		var sEven, sOdd, tEven, tOdd uint64
		q := p[:adlerBlock:adlerBlock]
		for i := 0; i < adlerBlock; i += 16 {
			x := binary.LittleEndian.Uint64(q[i:])
			tEven += sEven
			tOdd += sOdd
			sEven += x & evenBytes
			sOdd += x >> 8 & evenBytes
			x = binary.LittleEndian.Uint64(q[i+8:])
			tEven += sEven
			tOdd += sOdd
			sEven += x & evenBytes
			sOdd += x >> 8 & evenBytes
		}
		// Byte i of a word counts 8-i times, and eight times more for each word behind it.
		b += adlerBlock*a + 8*(fold(tEven)+fold(tOdd)) + weigh(sEven, 8) + weigh(sOdd, 7)
		b %= adlerPrime
		a = (a + fold(sEven) + fold(sOdd)) % adlerPrime
	}
	for _, c := range p {
		a += uint64(c)
		b += a
	}
	return uint32(b%adlerPrime<<16 | a%adlerPrime)
}

// fold is the sum of the lanes of v.
func fold(v uint64) uint64 {
	v = v&evenLanes + v>>16&evenLanes
	return v&(1<<32-1) + v>>32
}

// weigh is the sum of the lanes of v, the lowest counted n times and each other one two times less
// than the one below it.
func weigh(v, n uint64) uint64 {
	return v&0xffff*n + v>>16&0xffff*(n-2) + v>>32&0xffff*(n-4) + v>>48*(n-6)
}
