// Copyright (c) The vault-plugin-secrets-cable authors
// SPDX-License-Identifier: MPL-2.0

package cable_test

import (
	"testing"

	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cable"
	"github.com/cablesecrets/vault-plugin-secrets-cable/internal/cabletest"
)

// BenchmarkRequestToken measures a mint over loopback, the simulator's part of
// it included.
func BenchmarkRequestToken(b *testing.B) {
	run := func(b *testing.B, f func(b *testing.B, mint func())) {
		c := newClient(b, cabletest.NewServer(b, nil), cable.Config{})
		mint := func() {
			if _, err := c.RequestToken(b.Context(), ask()); err != nil {
				b.Error(err)
			}
		}
		mint()
		b.ReportAllocs()
		b.ResetTimer()
		f(b, mint)
	}
	b.Run("serial", func(b *testing.B) {
		run(b, func(b *testing.B, mint func()) {
			for b.Loop() {
				mint()
			}
		})
	})
	b.Run("parallel", func(b *testing.B) {
		run(b, func(b *testing.B, mint func()) {
			b.SetParallelism(16)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					mint()
				}
			})
		})
	})
}
