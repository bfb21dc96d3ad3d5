package eddsa

import (
	"sync"

	"filippo.io/edwards25519"
	"filippo.io/edwards25519/field"
)

// A table has multiples of one point, so that a scalar multiplication is 32 additions and no
// doubling: radix 256 with signed digits (Handbook of Elliptic and Hyperelliptic Curve
// Cryptography, section 9.3.3). Entry [i][j] is (j+1) * 256^i times the point. A table has 480 KiB.
//
// The time of an addition depends on the digits: signatures and public keys are no secrets.
type table [digits][window]cached

const (
	digits = 32
	window = 128
)

// cached is a point in affine coordinates, prepared for additions: y+x, y-x and 2dxy.
type cached struct{ plus, minus, t2d field.Element }

// extended is a point with x = X/Z, y = Y/Z and xy = T/Z (Hisil, Wong, Carter and Dawson, section
// 3).
type extended struct{ x, y, z, t field.Element }

// twoD is 2d of the curve -x^2 + y^2 = 1 + d x^2 y^2 (RFC 8032, section 5.1): d = -121665/121666.
var twoD = func() (d field.Element) {
	var n, m field.Element
	one := new(field.Element).One()
	n.Negate(n.Mult32(one, 121665))
	d.Multiply(&n, m.Invert(m.Mult32(one, 121666)))
	return *d.Add(&d, &d)
}()

// newTable makes the table of a point, in some milliseconds.
func newTable(p *edwards25519.Point) *table {
	points := make([]extended, 0, digits*window)
	base := p
	for range digits {
		multiple := new(edwards25519.Point).Set(base)
		for j := range window {
			if j > 0 {
				multiple.Add(multiple, base)
			}
			x, y, z, t := multiple.ExtendedCoordinates()
			points = append(points, extended{*x, *y, *z, *t})
		}
		base = new(edwards25519.Point).Add(multiple, multiple)
	}
	// One inversion serves all points (Montgomery's trick): products has z_0 * ... * z_i.
	products := make([]field.Element, len(points))
	product := new(field.Element).One()
	for i := range points {
		product.Multiply(product, &points[i].z)
		products[i] = *product
	}
	inverse := new(field.Element).Invert(product)
	t := new(table)
	for i := len(points) - 1; i >= 0; i-- {
		p := &points[i]
		var reciprocal, x, y field.Element
		reciprocal.Set(inverse)
		if i > 0 {
			reciprocal.Multiply(inverse, &products[i-1])
		}
		inverse.Multiply(inverse, &p.z)
		x.Multiply(&p.x, &reciprocal)
		y.Multiply(&p.y, &reciprocal)
		c := &t[i/window][i%window]
		c.plus.Add(&y, &x)
		c.minus.Subtract(&y, &x)
		c.t2d.Multiply(x.Multiply(&x, &y), &twoD)
	}
	return t
}

// recode returns signed digits of a scalar below 2^253 in radix 256: each from -127 to 128.
func recode(s *edwards25519.Scalar) (d [digits]int16) {
	carry := int16(0)
	for i, b := range s.Bytes() {
		d[i] = int16(b) + carry
		carry = 0
		if d[i] > window {
			d[i], carry = d[i]-2*window, 1
		}
	}
	return d
}

// add adds a point, and sub subtracts one (Hisil, Wong, Carter and Dawson, section 3.1, with Z of
// the second point 1).
func (e *extended) add(c *cached) { e.mixed(&c.plus, &c.minus, &c.t2d, false) }
func (e *extended) sub(c *cached) { e.mixed(&c.minus, &c.plus, &c.t2d, true) }

func (e *extended) mixed(plus, minus, t2d *field.Element, negative bool) {
	var a, b, c, d, f, g field.Element
	a.Multiply(a.Add(&e.y, &e.x), plus)
	b.Multiply(b.Subtract(&e.y, &e.x), minus)
	c.Multiply(&e.t, t2d)
	d.Add(&e.z, &e.z)
	if negative {
		f.Add(&d, &c)
		g.Subtract(&d, &c)
	} else {
		f.Subtract(&d, &c)
		g.Add(&d, &c)
	}
	c.Subtract(&a, &b)
	d.Add(&a, &b)
	e.x.Multiply(&c, &f)
	e.y.Multiply(&g, &d)
	e.t.Multiply(&c, &d)
	e.z.Multiply(&f, &g)
}

// multiply adds a multiple of the table's point.
func (t *table) multiply(e *extended, s *edwards25519.Scalar) {
	for i, d := range recode(s) {
		switch {
		case d > 0:
			e.add(&t[i][d-1])
		case d < 0:
			e.sub(&t[i][-d-1])
		}
	}
}

// bytes is the encoding of a point (RFC 8032, section 5.1.2).
func (e *extended) bytes() (b [32]byte) {
	var reciprocal, x, y field.Element
	reciprocal.Invert(&e.z)
	x.Multiply(&e.x, &reciprocal)
	y.Multiply(&e.y, &reciprocal)
	copy(b[:], y.Bytes())
	b[31] |= byte(x.IsNegative() << 7)
	return b
}

// combination returns the encoding of [s]B + [k]P, where P is the point of the table.
func (t *table) combination(s, k *edwards25519.Scalar) [32]byte {
	e := extended{x: *new(field.Element).Zero(), y: *new(field.Element).One(), z: *new(field.Element).One()}
	base().multiply(&e, s)
	t.multiply(&e, k)
	return e.bytes()
}

// base is the table of the base point.
var base = sync.OnceValue(func() *table { return newTable(edwards25519.NewGeneratorPoint()) })

// smallOrders are the canonical encodings of the points of small order.
var smallOrders = func() map[[32]byte]bool {
	// A point of order 8: y of [RFC 8032, section 5.1.3] with a cofactor part, found by [L]P.
	all := map[[32]byte]bool{}
	for y := byte(2); len(all) < 8; y++ {
		p, err := new(edwards25519.Point).SetBytes(append([]byte{y}, make([]byte, 31)...))
		if err != nil {
			continue
		}
		torsion := new(edwards25519.Point).VarTimeDoubleScalarBaseMult(minusOne, p, zero)
		torsion.Add(torsion, p)
		clear(all)
		each := edwards25519.NewIdentityPoint()
		for range 8 {
			all[[32]byte(each.Bytes())] = true
			each.Add(each, torsion)
		}
	}
	return all
}()

// Tables are made for keys that verify often, away from the path of requests, and are bounded: 32
// have 15 MiB. A table costs as much as some 70 verifications save, so a key without one gets a
// table after many more, in the place of the one that was used least since.
const (
	maxTables = 32
	worth     = 512 // verifications
)

// tables are the keys that have tables.
var tables struct {
	sync.Mutex
	keys   []*PublicKey
	making bool
}

// used counts a verification without a table, and has a table made when it is worth it.
func (k *PublicKey) used() {
	if k.uses.Add(1)%worth != 0 {
		return
	}
	tables.Lock()
	defer tables.Unlock()
	if tables.making {
		return
	}
	tables.making = true
	go func() {
		made := newTable(&k.minus)
		base()
		tables.Lock()
		defer tables.Unlock()
		tables.making = false
		k.keep(made)
	}()
}

// keep gives a table to the key. The caller holds the lock.
func (k *PublicKey) keep(made *table) {
	if k.table.Load() != nil {
		return
	}
	if len(tables.keys) == maxTables {
		least := 0
		for i, each := range tables.keys {
			if each.uses.Load() < tables.keys[least].uses.Load() {
				least = i
			}
		}
		tables.keys[least].table.Store(nil)
		tables.keys[least] = tables.keys[maxTables-1]
		tables.keys = tables.keys[:maxTables-1]
		for _, each := range tables.keys { // uses of long ago must not count for ever
			each.uses.Store(each.uses.Load() / 2)
		}
	}
	tables.keys = append(tables.keys, k)
	k.table.Store(made)
}
