//! Cuts a stream of bytes into lines, with a bound on their length. In: chunks as they are read. Out: lines without their end.

use std::collections::VecDeque;

/// A line grew past the bound before it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TooLong;

/// Bytes that were read and not yet taken as lines.
#[derive(Debug)]
pub(super) struct LineBuffer {
    bytes: VecDeque<u8>,
    /// So many bytes from the front are known to hold no line end: nothing is looked at twice.
    searched: usize,
    limit: usize,
}

impl LineBuffer {
    /// An empty buffer for lines of at most `limit` bytes.
    pub(super) fn new(limit: usize) -> Self {
        Self { bytes: VecDeque::new(), searched: 0, limit }
    }

    /// Takes in what was read.
    pub(super) fn push(&mut self, chunk: &[u8]) {
        self.bytes.extend(chunk);
    }

    /// The next whole line, without `\n` or `\r\n`; `None` until more is pushed.
    pub(super) fn next_line(&mut self) -> Result<Option<Vec<u8>>, TooLong> {
        let Some(end) = self.bytes.iter().skip(self.searched).position(|byte| *byte == b'\n') else {
            self.searched = self.bytes.len();
            return if self.searched > self.limit { Err(TooLong) } else { Ok(None) };
        };
        let end = self.searched.saturating_add(end);
        self.searched = 0;
        if end > self.limit {
            return Err(TooLong);
        }
        let mut line: Vec<u8> = self.bytes.drain(..=end).collect();
        line.pop();
        if line.last() == Some(&b'\r') {
            line.pop();
        }
        Ok(Some(line))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    fn all(buffer: &mut LineBuffer) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| buffer.next_line().unwrap()).collect()
    }

    #[test]
    fn a_line_without_end_is_bounded() {
        let mut buffer = LineBuffer::new(4);
        buffer.push(b"1234");
        assert_eq!(buffer.next_line(), Ok(None));
        buffer.push(b"\n12345");
        assert_eq!(buffer.next_line(), Ok(Some(b"1234".to_vec())));
        assert_eq!(buffer.next_line(), Err(TooLong));
    }

    proptest! {
        #[test]
        fn lines_do_not_depend_on_how_the_stream_was_cut(lines in prop::collection::vec("[^\r\n]{0,20}", 0..20), cuts in prop::collection::vec(1_usize..9, 1..20)) {
            let stream: Vec<u8> = lines.iter().flat_map(|line| format!("{line}\r\n").into_bytes()).collect();
            let mut buffer = LineBuffer::new(100);
            let (mut seen, mut rest) = (Vec::new(), stream.as_slice());
            for cut in cuts.iter().cycle() {
                if rest.is_empty() { break; }
                let (head, tail) = rest.split_at((*cut).min(rest.len()));
                buffer.push(head);
                seen.extend(all(&mut buffer));
                rest = tail;
            }
            let expected: Vec<Vec<u8>> = lines.into_iter().map(String::into_bytes).collect();
            prop_assert_eq!(seen, expected);
        }

        #[test]
        fn any_bytes_are_taken(chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..20)) {
            let mut buffer = LineBuffer::new(16);
            for chunk in chunks {
                buffer.push(&chunk);
                while let Ok(Some(line)) = buffer.next_line() { prop_assert!(line.len() <= 16); }
            }
        }
    }
}
