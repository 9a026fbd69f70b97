package fakes_test

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/fakes"
	"github.com/holdfast-backup/holdfast/internal/clock"
)

var epoch = time.Date(2020, 2, 29, 12, 0, 0, 0, time.UTC)

func TestClockFiresTimersInOrder(t *testing.T) {
	c := fakes.NewClock(epoch)
	late, early, never := c.NewTimer(time.Hour), c.NewTimer(time.Minute), c.NewTimer(2*time.Hour)
	require.Equal(t, 3, c.Timers())
	c.Advance(90 * time.Minute)
	require.Equal(t, epoch.Add(time.Minute), <-early.C())
	require.Equal(t, epoch.Add(time.Hour), <-late.C())
	require.Empty(t, never.C())
	require.Equal(t, epoch.Add(90*time.Minute), c.Now())
	require.True(t, never.Stop())
	require.False(t, late.Stop())
	require.Zero(t, c.Timers())
	require.Equal(t, c.Now(), <-c.After(0))
}

func TestClockWakesSleepers(t *testing.T) {
	c := fakes.NewClock(epoch)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 2)
	go func() { done <- clock.Sleep(ctx, c, time.Hour) }()
	require.NoError(t, c.WaitTimers(ctx, 1))
	c.Advance(time.Hour)
	require.NoError(t, <-done)
	go func() { done <- clock.Sleep(ctx, c, time.Hour) }()
	require.NoError(t, c.WaitTimers(ctx, 1))
	cancel()
	require.ErrorIs(t, <-done, context.Canceled)
	require.ErrorIs(t, c.WaitTimers(ctx, 1), context.Canceled)
}
