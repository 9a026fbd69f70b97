package clock_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-backup/holdfast/internal/clock"
)

func TestRealSleeps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := clock.Real()
		start := c.Now()
		require.NoError(t, clock.Sleep(t.Context(), c, time.Hour))
		require.Equal(t, time.Hour, c.Now().Sub(start))
		require.Equal(t, start.Add(2*time.Hour), <-c.After(time.Hour))
	})
}

func TestSleepEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		start := time.Now()
		require.ErrorIs(t, clock.Sleep(ctx, clock.Real(), time.Hour), context.DeadlineExceeded)
		require.Equal(t, time.Minute, time.Since(start))
		require.ErrorIs(t, clock.Sleep(ctx, clock.Real(), 0), context.DeadlineExceeded)
	})
}

func TestTimerStops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		timer := clock.Real().NewTimer(time.Second)
		require.True(t, timer.Stop())
		require.False(t, timer.Stop())
		require.NoError(t, clock.Sleep(t.Context(), clock.Real(), time.Minute))
		require.Empty(t, timer.C())
	})
}

func TestWithTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := clock.WithTimeout(t.Context(), clock.Real(), time.Minute)
		defer cancel()
		require.NoError(t, clock.Sleep(t.Context(), clock.Real(), 59*time.Second))
		require.NoError(t, ctx.Err())
		<-ctx.Done()
		require.ErrorIs(t, ctx.Err(), context.Canceled)
		require.ErrorIs(t, context.Cause(ctx), context.DeadlineExceeded)
		require.True(t, clock.TimedOut(ctx))
	})
}

func TestWithTimeoutCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // ends only when no goroutine is left
		ctx, cancel := clock.WithTimeout(t.Context(), clock.Real(), time.Minute)
		cancel()
		<-ctx.Done()
		require.False(t, clock.TimedOut(ctx))
		require.ErrorIs(t, context.Cause(ctx), context.Canceled)
	})
}
