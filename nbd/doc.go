// Package nbd is a client and a server for the NBD protocol (fixed newstyle), in pure Go, using the
// standard library alone. It knows nothing of virtual machines.
//
// # Client
//
// [Dial] negotiates one or more connections to an export and returns a [Client], which is an
// [io.ReaderAt] and [io.WriterAt] with many requests in flight. It speaks STARTTLS, structured replies
// (falling back to plain ones), GO with block sizes (falling back to EXPORT_NAME), metadata contexts and
// block status. What a server grants is never assumed: an unknown metadata context is silently dropped
// by servers, so [Config.RequiredContexts] turns that into an error, and [Client.Contexts] lists what
// was granted. [List] and [Describe] ask about exports without opening them.
//
// # Server
//
// [NewServer] serves exports given by an [ExportSource]. A backend needs Size and ReadAt; writing,
// zeroing, trimming, flushing and metadata contexts are optional interfaces.
//
// # Trust
//
// Both sides treat their peer as hostile: lengths are checked before they are used, memory is bounded
// by what the local side asked for or configured, and any violation closes the connection with an error
// matching [ErrProtocol]. TLS that was required and not obtained is an error, never a downgrade.
package nbd
