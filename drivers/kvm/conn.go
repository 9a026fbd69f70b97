package kvm

import (
	"context"
)

// conn is one libvirt connection. Domains are named by UUID. Every method returns
// when its context ends; the call itself may then still be under way. A lost
// connection is made anew by the next call. Errors of the daemon are *virError,
// those of the connection match hypervisor.ErrUnavailable.
type conn interface {
	leaf() string // names the leaf, for Info

	versions(ctx context.Context) (libvirt, hypervisor uint64, err error)
	hostname(ctx context.Context) (string, error)

	domains(ctx context.Context) ([]string, error)
	lookupName(ctx context.Context, name string) (uuid string, err error)
	domainXML(ctx context.Context, uuid string, flags uint32) (string, error)
	state(ctx context.Context, uuid string) (state, reason int, err error)
	persistent(ctx context.Context, uuid string) (bool, error)
	managedSave(ctx context.Context, uuid string) (bool, error)
	capacity(ctx context.Context, uuid, disk string) (int64, error)

	define(ctx context.Context, xml string) (uuid string, err error)
	undefine(ctx context.Context, uuid string, flags uint32) error
	start(ctx context.Context, uuid string, flags uint32) error
	destroy(ctx context.Context, uuid string) error
	shutdown(ctx context.Context, uuid string) error
	resume(ctx context.Context, uuid string) error
	// setMetadata stores an element under metadataURI; empty removes it.
	setMetadata(ctx context.Context, uuid, xml string, flags uint32) error

	jobType(ctx context.Context, uuid string) (int, error)
	jobOperation(ctx context.Context, uuid string) (int, error)
	abortJob(ctx context.Context, uuid string) error
	// blockJob returns the type of the block job of a disk; found is false
	// without one.
	blockJob(ctx context.Context, uuid, disk string) (jobType int, found bool, err error)
	// backupBegin starts a job; an empty checkpoint makes none.
	backupBegin(ctx context.Context, uuid, backup, checkpoint string, flags uint32) error
	backupXML(ctx context.Context, uuid string) (string, error)

	checkpoints(ctx context.Context, uuid string) ([]string, error)
	checkpointXML(ctx context.Context, uuid, name string, flags uint32) (string, error)
	checkpointCreate(ctx context.Context, uuid, xml string, flags uint32) error
	checkpointDelete(ctx context.Context, uuid, name string, flags uint32) error

	// agent sends one command to the guest agent; the daemon gives up after
	// timeout seconds.
	agent(ctx context.Context, uuid, command string, timeout int) (string, error)
	// monitor sends one QMP command to QEMU.
	monitor(ctx context.Context, uuid, command string) (string, error)

	networkExists(ctx context.Context, name string) (bool, error)
	poolXML(ctx context.Context, name string) (string, error)

	close() error
}

// Values of libvirt's enumerations.
const (
	stateRunning     = 1
	stateBlocked     = 2
	statePaused      = 3
	stateShutdown    = 4
	stateShutoff     = 5
	stateCrashed     = 6
	statePMSuspended = 7

	shutoffShutdown  = 1
	shutoffDestroyed = 2
	shutoffCrashed   = 3
	shutoffMigrated  = 4
	shutoffSaved     = 5
	shutoffFailed    = 6
	shutoffSnapshot  = 7

	xmlSecure   = 1 << 0
	xmlInactive = 1 << 1

	startPaused = 1 << 0

	undefineManagedSave         = 1 << 0
	undefineSnapshotsMetadata   = 1 << 1
	undefineNVRAM               = 1 << 2
	undefineCheckpointsMetadata = 1 << 4

	affectLive   = 1 << 0
	affectConfig = 1 << 1

	metadataElement = 2

	jobNone            = 0
	jobCompleted       = 3
	jobOperationBackup = 9

	redefine         = 1 << 0
	redefineValidate = 1 << 2
	metadataOnly     = 1 << 1
	checkpointNoDom  = 1 << 1
	checkpointSize   = 1 << 2
)

// await runs f and returns its result, or the context's error as soon as the
// context ends. f then goes on by itself, and its result is dropped.
func await[T any](ctx context.Context, f func() (T, error)) (T, error) {
	type result struct {
		v   T
		err error
	}
	var zero T
	if err := ctx.Err(); err != nil {
		return zero, context.Cause(ctx)
	}
	ch := make(chan result, 1)
	go func() {
		v, err := f()
		ch <- result{v, err}
	}()
	select {
	case r := <-ch:
		return r.v, r.err
	case <-ctx.Done():
		return zero, context.Cause(ctx)
	}
}

// semaphore is a lock that waiting for can be given up. Unlike a mutex it may be
// held across calls to the daemon.
type semaphore chan struct{}

func newSemaphore() semaphore { return make(semaphore, 1) }

func (s semaphore) acquire(ctx context.Context) error {
	select {
	case s <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (s semaphore) release() { <-s }
