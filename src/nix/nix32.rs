//! Nix32, the base-32 encoding of Nix: the digits `0-9a-z` without `e o t u`, the last digit
//! holding the lowest bits (Nix manual, "Store path specification" and glossary, "Nix32").

use super::Malformed;

/// The 32 digits in the order of their values.
pub const ALPHABET: &str = "0123456789abcdfghijklmnpqrsvwxyz";

/// Value of each byte as a digit; [`NONE`] for bytes that are no digit.
const VALUES: [u8; 256] = {
    let (mut values, mut value) = ([NONE; 256], 0);
    while value < 32 {
        values[ALPHABET.as_bytes()[value] as usize] = value as u8;
        value += 1;
    }
    values
};
const NONE: u8 = u8::MAX;

/// Encodes `bytes` as `ceil(8 n / 5)` digits.
pub fn encode(bytes: &[u8]) -> String {
    let byte = |at: usize| u16::from(bytes.get(at).copied().unwrap_or(0));
    let digit = |n: usize| {
        let (at, shift) = (5 * n / 8, 5 * n % 8);
        ALPHABET.as_bytes()[usize::from((byte(at) | byte(at + 1) << 8) >> shift & 31)]
    };
    let digits: Vec<u8> = (0..(8 * bytes.len()).div_ceil(5)).rev().map(digit).collect();
    String::from_utf8(digits).expect("digits are ASCII")
}

/// Decodes a Nix32 text.
///
/// # Errors
/// A byte that is no digit, a length that no byte string encodes to, or leftover bits that are not
/// zero.
pub fn decode(text: &[u8]) -> Result<Vec<u8>, Malformed> {
    const MALFORMED: Malformed = Malformed::new("Nix32", "not a Nix32 text");
    let mut bytes = Vec::with_capacity(5 * text.len() / 8);
    let (mut bits, mut held) = (0u16, 0);
    for &digit in text.iter().rev() {
        let value = VALUES[usize::from(digit)];
        if value == NONE {
            return Err(MALFORMED);
        }
        bits |= u16::from(value) << held;
        held += 5;
        if held >= 8 {
            bytes.push(bits as u8);
            bits >>= 8;
            held -= 8;
        }
    }
    if bits != 0 || held >= 5 { Err(MALFORMED) } else { Ok(bytes) }
}

/// Returns the digit of the lowest five bits of `value`.
pub fn digit(value: u8) -> u8 {
    ALPHABET.as_bytes()[usize::from(value & 31)]
}

/// Returns the value of a digit, or 255 for a byte that is no digit.
pub fn value(digit: u8) -> u8 {
    VALUES[usize::from(digit)]
}

/// Returns whether every byte of `text` is a Nix32 digit.
pub fn is_nix32(text: &[u8]) -> bool {
    text.iter().all(|&b| VALUES[usize::from(b)] != NONE)
}

#[cfg(test)]
mod tests {
    use super::*;

    // Printed by `nix-hash --type sha256 --to-base32` (Nix 2.8).
    const EMPTY_HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    const EMPTY_NIX32: &str = "0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73";

    #[test]
    fn encoding_equals_that_of_nix_hash() {
        let bytes = data_encoding::HEXLOWER.decode(EMPTY_HEX.as_bytes()).unwrap();
        assert_eq!(encode(&bytes), EMPTY_NIX32);
        assert_eq!(decode(EMPTY_NIX32.as_bytes()).unwrap(), bytes);
    }

    #[test]
    fn digits_have_their_values() {
        for (at, digit) in ALPHABET.bytes().enumerate() {
            assert_eq!(usize::from(value(digit)), at);
        }
        assert!((0..=u8::MAX).all(|byte| is_nix32(&[byte])
            || !ALPHABET.as_bytes().contains(&byte)
            || value(byte) > 31));
    }

    #[test]
    fn every_length_round_trips() {
        for len in 0..70usize {
            let bytes: Vec<u8> = (0..len).map(|i| (i * 37 + len) as u8).collect();
            let text = encode(&bytes);
            assert_eq!(text.len(), (len * 8).div_ceil(5));
            assert_eq!(decode(text.as_bytes()).unwrap(), bytes);
        }
    }

    #[test]
    fn invalid_text_is_refused() {
        for bad in ["e", "0u", "A0", "00 0"] {
            assert!(decode(bad.as_bytes()).is_err(), "{bad}");
        }
        // A first digit "z" needs bits beyond the last byte.
        assert!(decode(b"z000000000000000000000000000000000000000000000000000").is_err());
        assert!(!is_nix32(b"abce"));
        assert!(is_nix32(ALPHABET.as_bytes()));
    }
}
