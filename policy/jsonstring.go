package policy

import (
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// string reads a string, and returns it if that is wanted.
func (p *jsonParser) string(wanted bool) (string, error) {
	p.pos++
	start, ascii := p.pos, true
	for p.pos < len(p.text) {
		switch c := p.text[p.pos]; {
		case c == '"':
			s := p.text[start:p.pos]
			if !ascii && wanted {
				s = validUTF8(s)
			}
			p.pos++
			return s, nil
		case c == '\\':
			return p.escaped(start, wanted)
		case c < ' ':
			return "", p.errorf("control character in a string")
		case c >= utf8.RuneSelf:
			ascii = false
		}
		p.pos++
	}
	return "", p.errorf("unexpected end of a string")
}

// escaped reads the rest of a string that began at start and has an escape here.
func (p *jsonParser) escaped(start int, wanted bool) (string, error) {
	buf := append(p.buf[:0], p.text[start:p.pos]...)
	defer func() { p.buf = buf[:0] }()
	for p.pos < len(p.text) {
		c := p.text[p.pos]
		switch {
		case c == '"':
			p.pos++
			if !wanted {
				return "", nil
			}
			return validUTF8(string(buf)), nil
		case c == '\\':
			var err error
			if buf, err = p.escape(buf); err != nil {
				return "", err
			}
		case c < ' ':
			return "", p.errorf("control character in a string")
		default:
			buf = append(buf, c)
			p.pos++
		}
	}
	return "", p.errorf("unexpected end of a string")
}

// escape appends to buf what the escape here stands for.
func (p *jsonParser) escape(buf []byte) ([]byte, error) {
	if p.pos++; p.pos >= len(p.text) {
		return nil, p.errorf("unexpected end of a string")
	}
	c := p.text[p.pos]
	switch c {
	case '"', '\\', '/':
	case 'b':
		c = '\b'
	case 'f':
		c = '\f'
	case 'n':
		c = '\n'
	case 'r':
		c = '\r'
	case 't':
		c = '\t'
	case 'u':
		r, ok := hex4(p.text[p.pos+1:])
		if !ok {
			return nil, p.errorf("unknown escape")
		}
		p.pos += 5
		if utf16.IsSurrogate(r) {
			low, ok := rune(0), false
			if strings.HasPrefix(p.text[p.pos:], `\u`) {
				low, ok = hex4(p.text[p.pos+2:])
			}
			if r = utf16.DecodeRune(r, low); ok && r != utf8.RuneError {
				p.pos += 6
			}
		}
		return utf8.AppendRune(buf, r), nil
	default:
		return nil, p.errorf("unknown escape")
	}
	p.pos++
	return append(buf, c), nil
}

// hex4 returns the number that s begins with, in four hexadecimal digits.
func hex4(s string) (rune, bool) {
	if len(s) < 4 {
		return 0, false
	}
	var r rune
	for i := range 4 {
		c := s[i]
		switch {
		case isDigit(c):
			c -= '0'
		case 'a' <= c && c <= 'f':
			c -= 'a' - 10
		case 'A' <= c && c <= 'F':
			c -= 'A' - 10
		default:
			return 0, false
		}
		r = r<<4 | rune(c)
	}
	return r, true
}

// validUTF8 returns s with each byte that is not UTF-8 as U+FFFD, as
// encoding/json does. (strings.ToValidUTF8 has one for a run of such bytes.)
func validUTF8(s string) string {
	if utf8.ValidString(s) {
		return s
	}
	return string([]rune(s))
}
