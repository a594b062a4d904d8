-- The hold of a request without a limit on its output was a typical amount: many at once could cost more than the balance. Now
-- the functions are told the smallest hold too, which is one more parameter. Locks nothing but the functions, for a moment. A
-- process of the version before gets errors until it is replaced, and answers 503.
DROP FUNCTION IF EXISTS settle_and_hold(
    boolean, bigint[], uuid[], bigint[], numeric[], text[], bigint[], bigint[], uuid, double precision, numeric,
    integer, integer, bigint[], bytea[], uuid[], bigint[], bigint[], text[], text[], text[], bytea[]
);

DROP FUNCTION IF EXISTS place_holds(
    bigint[], uuid, double precision, numeric, integer, integer, bigint[], bytea[], uuid[], bigint[], bigint[], text[],
    text[], text[], bytea[]
);
