package kopiarepo

import "context"

// OpKind is a kind of storage operation.
type OpKind string

// Kinds of storage operations. OpGet, OpStat and OpList read; the others write.
const (
	OpGet    OpKind = "get"
	OpStat   OpKind = "stat"
	OpList   OpKind = "list"
	OpPut    OpKind = "put"    // atomic create or replace
	OpCreate OpKind = "create" // atomic create, fails if the name exists
	OpDelete OpKind = "delete"
	OpSync   OpKind = "sync" // makes names durable
)

// Writes reports whether operations of this kind change the storage.
func (k OpKind) Writes() bool { return k != OpGet && k != OpStat && k != OpList }

// StorageOp is one operation on the storage under a repository.
type StorageOp struct {
	N    int64 // number of this operation since the repository was opened, from 1
	Kind OpKind
	Name string // path of the file under the repository's directory
}

// StorageHook sees each storage operation before it is done. An error means that
// it is not done, and fails with that error. The function that it returns may be
// nil; otherwise it is called after the operation with its result, and what it
// returns is the result. Hooks may delay, count, fail or end the process. They
// are called concurrently.
type StorageHook func(ctx context.Context, op StorageOp) (after func(error) error, err error)
