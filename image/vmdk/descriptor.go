package vmdk

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// NoParent is the ParentCID of a disk that is based on no other.
const NoParent = 0xffffffff

// Descriptor is the text part of an image.
type Descriptor struct {
	CID        uint32 // content ID: changes with the first write after an open
	ParentCID  uint32 // CID that the parent must have, NoParent for none
	CreateType string // such as "streamOptimized"
	ParentHint string // file name of the parent as the writer knew it; untrusted
	Extents    []ExtentLine
	DDB        map[string]string // disk database: "ddb.adapterType" and so on
}

// ExtentLine says where a range of the disk lies. The ranges follow each other.
type ExtentLine struct {
	Access string // "RW", "RDONLY" or "NOACCESS"
	Size   int64  // bytes, a multiple of 512
	Type   string // "FLAT", "VMFS", "SPARSE", "VMFSSPARSE", "ZERO" and others
	Name   string // file name, untrusted; empty for ZERO
	Offset int64  // of a FLAT or VMFS extent in its file: bytes, a multiple of 512
}

// Size returns the sum of the extents in bytes.
func (d *Descriptor) Size() int64 {
	n := int64(0)
	for _, e := range d.Extents {
		n += e.Size
	}
	return n
}

// ParseDescriptor reads a descriptor, at most 1 MiB. Zero bytes behind the text are ignored, and so
// is the end of a slightly longer text that lay there before; b is not retained.
func ParseDescriptor(b []byte) (*Descriptor, error) {
	d, line, err := parseDescriptor(b)
	if err != nil {
		return nil, &Error{Op: "descriptor", Err: fmt.Errorf("line %d: %w", line, err)}
	}
	return d, nil
}

func parseDescriptor(b []byte) (*Descriptor, int, error) {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		if !remains(b[:i], b[i:]) {
			return nil, 0, corrupt("text behind a zero byte")
		}
		b = b[:i]
	}
	if len(b) > maxDescriptor {
		return nil, 0, corrupt("descriptor of %d bytes", len(b))
	}
	d := &Descriptor{ParentCID: NoParent, DDB: map[string]string{}}
	seen := map[string]bool{}
	total, n, signed := int64(0), 0, false
	for raw := range strings.Lines(string(b)) {
		n++
		line := strings.TrimSpace(raw)
		if !signed {
			if !strings.EqualFold(line, "# Disk DescriptorFile") {
				return nil, n, corrupt("no descriptor signature")
			}
			signed = true
			continue
		}
		if line == "" || line[0] == '#' {
			continue
		}
		word, _, _ := strings.Cut(line, " ")
		if word == "RW" || word == "RDONLY" || word == "NOACCESS" {
			e, err := parseExtent(line)
			if err != nil {
				return nil, n, err
			}
			if total += e.Size; total > MaxSize || len(d.Extents) == maxExtents {
				return nil, n, corrupt("%d extents, %d bytes", len(d.Extents)+1, total)
			}
			d.Extents = append(d.Extents, e)
			continue
		}
		key, value, ok := strings.Cut(line, "=")
		if !ok {
			return nil, n, corrupt("neither an extent nor an assignment")
		}
		if err := d.set(strings.TrimSpace(key), strings.TrimSpace(value), seen); err != nil {
			return nil, n, err
		}
	}
	switch {
	case !signed:
		return nil, n, corrupt("no descriptor signature")
	case !seen["version"] || !seen["createtype"] || !seen["cid"]:
		return nil, n, corrupt("version, CID or createType is missing")
	}
	return d, n, nil
}

// remains says whether what lies behind text is zeros and what a longer version of the same text
// left there: qemu writes a content ID without leading zeros, and does not clear the rest. That
// version was at most 7 bytes longer, and had the same end.
func remains(text, behind []byte) bool {
	n := 0
	for piece := range bytes.SplitSeq(bytes.Trim(behind, "\x00"), []byte{0}) {
		if n += len(piece); n > 7 || !bytes.HasSuffix(text, piece) {
			return false
		}
	}
	return true
}

// set takes one assignment. Keys not known here are allowed and dropped.
func (d *Descriptor) set(key, value string, seen map[string]bool) error {
	value, err := unquote(value)
	if err != nil {
		return err
	}
	low := strings.ToLower(key)
	if seen[low] {
		return corrupt("%q is set twice", key)
	}
	seen[low] = true
	switch low {
	case "version":
		v, err := strconv.ParseUint(value, 10, 31)
		if err != nil {
			return corrupt("version is %q", value)
		}
		if v < 1 || v > 4 {
			return unsupported("descriptor version %d", v)
		}
	case "cid", "parentcid":
		v, err := strconv.ParseUint(value, 16, 32)
		if err != nil {
			return corrupt("%s is %q", key, value)
		}
		if low == "cid" {
			d.CID = uint32(v)
		} else {
			d.ParentCID = uint32(v)
		}
	case "createtype":
		d.CreateType = value
	case "parentfilenamehint":
		d.ParentHint = value
	default:
		if strings.HasPrefix(low, "ddb.") {
			d.DDB[key] = value
		}
	}
	return nil
}

func unquote(s string) (string, error) {
	if !utf8.ValidString(s) {
		s = strings.ToValidUTF8(s, "\ufffd") // names in the charset of another system
	}
	if len(s) >= 2 && s[0] == '"' && s[len(s)-1] == '"' {
		s = s[1 : len(s)-1]
	}
	if strings.ContainsAny(s, "\"\r") {
		return "", corrupt("stray quotation mark or line end in %q", s)
	}
	return s, nil
}

// parseExtent reads `RW 2048 FLAT "name" 0`.
func parseExtent(line string) (ExtentLine, error) {
	head, rest, quoted := strings.Cut(line, "\"")
	f := strings.Fields(head)
	if len(f) < 3 || (quoted && len(f) != 3) {
		return ExtentLine{}, corrupt("extent line %q", line)
	}
	e := ExtentLine{Access: f[0], Type: f[2]}
	var err error
	if e.Size, err = sectors(f[1]); err != nil {
		return ExtentLine{}, err
	}
	if !quoted {
		if e.Type != "ZERO" || len(f) != 3 {
			return ExtentLine{}, corrupt("extent line %q names no file", line)
		}
		return e, nil
	}
	name, tail, ok := strings.Cut(rest, "\"")
	if !ok || name == "" {
		return ExtentLine{}, corrupt("extent line %q has no file name", line)
	}
	if e.Name, err = unquote(name); err != nil {
		return ExtentLine{}, err
	}
	more := strings.Fields(tail)
	if len(more) > 0 {
		if e.Offset, err = sectors(more[0]); err != nil {
			return ExtentLine{}, err
		}
	}
	if len(more) > 1 && e.Type != "VMFSRDM" && e.Type != "VMFSRAW" {
		return ExtentLine{}, corrupt("extent line %q has words behind the offset", line)
	}
	return e, nil
}

// sectors reads a number of sectors and returns it in bytes.
func sectors(s string) (int64, error) {
	v, err := strconv.ParseUint(s, 10, 63)
	if err != nil || v > MaxSize/sector {
		return 0, corrupt("%q is no usable number of sectors", s)
	}
	return int64(v) * sector, nil
}

// Marshal returns the text. It fails when a string cannot be expressed in it.
func (d *Descriptor) Marshal() ([]byte, error) {
	var b bytes.Buffer
	fmt.Fprintf(&b, "# Disk DescriptorFile\nversion=1\nCID=%08x\nparentCID=%08x\ncreateType=\"%s\"\n",
		d.CID, d.ParentCID, d.CreateType)
	if d.ParentHint != "" {
		fmt.Fprintf(&b, "parentFileNameHint=\"%s\"\n", d.ParentHint)
	}
	b.WriteString("\n# Extent description\n")
	words := []string{d.CreateType, d.ParentHint}
	for _, e := range d.Extents {
		fmt.Fprintf(&b, "%s %d %s", e.Access, e.Size/sector, e.Type)
		if e.Type != "ZERO" {
			fmt.Fprintf(&b, " \"%s\"", e.Name)
		}
		if e.Type == "FLAT" || e.Type == "VMFS" && e.Offset != 0 {
			fmt.Fprintf(&b, " %d", e.Offset/sector)
		}
		b.WriteByte('\n')
		words = append(words, e.Access, e.Type, e.Name)
	}
	b.WriteString("\n# The Disk Data Base\n#DDB\n\n")
	for _, k := range slices.Sorted(maps.Keys(d.DDB)) {
		fmt.Fprintf(&b, "%s = \"%s\"\n", k, d.DDB[k])
		words = append(words, k, d.DDB[k])
	}
	for _, w := range words {
		if strings.ContainsAny(w, "\"\r\n\x00") || !utf8.ValidString(w) {
			return nil, &Error{Op: "descriptor", Err: unsupported("%q in a descriptor", w)}
		}
	}
	if b.Len() > maxDescriptor {
		return nil, &Error{Op: "descriptor", Err: unsupported("a descriptor of %d bytes", b.Len())}
	}
	return b.Bytes(), nil
}
