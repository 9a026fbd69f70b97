// Package connect turns what a person types, a hypervisor URL or the location of
// a repository, into the driver or engine behind it. It is the one package that
// links drivers and engines.
package connect
