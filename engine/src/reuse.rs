//! Vectors that keep their memory from step to step.

/// Returns an empty vector in the memory of `vec`, whose elements are of the same layout: their types differ in a lifetime.
///
/// Safe code: a map of a vector's own iterator is collected in place. Were it not, steps would allocate, and
/// `tests/allocations.rs` would say so.
pub(crate) fn reuse<A, B>(mut vec: Vec<A>) -> Vec<B> {
    vec.clear();
    vec.into_iter().map(|_| unreachable!("it was cleared")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_is_the_same() {
        let text = String::from("text");
        let vec: Vec<&str> = vec![&text; 5];
        let (start, capacity) = (vec.as_ptr().cast::<u8>(), vec.capacity());
        let vec: Vec<&'static str> = reuse(vec);
        assert!(vec.is_empty());
        assert_eq!((vec.as_ptr().cast::<u8>(), vec.capacity()), (start, capacity));
    }
}
