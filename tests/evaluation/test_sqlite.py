"""Execution accuracy: equal rows count, whatever the SQL; anything else a model may write is merely wrong."""

import sqlite3

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_adapters.errors import FormatError, NotFoundError
from mlx_adapters.evaluation.sqlite import Database, extract_sql, is_correct, is_ordered, same_rows


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    path = tmp_path_factory.mktemp("score") / "shop.sqlite"
    with sqlite3.connect(path) as connection:
        connection.executescript(
            "CREATE TABLE item (name TEXT, price REAL, stock INTEGER);"
            "INSERT INTO item VALUES ('pen', 1.5, 10), ('ink', 4, 0), ('cap', NULL, 3), ('pen', 1.5, 7);"
        )
    connection.close()
    return Database(path)


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("SELECT name FROM item WHERE stock > 0", "SELECT name FROM item WHERE NOT stock <= 0", True),
        ("select 3.0", "SELECT COUNT(*) FROM item WHERE stock > 0", True),
        ("SELECT name FROM item ORDER BY name", "SELECT name FROM item", True),
        ("SELECT name FROM item ORDER BY name DESC", "SELECT name FROM item ORDER BY name", False),
        ("SELECT DISTINCT name FROM item", "SELECT name FROM item", False),
        ("SELECT name, price FROM item", "SELECT name FROM item", False),
        ("SELECT price FROM item WHERE name = 'cap'", "SELECT NULL", True),
        ("SELECT '3'", "SELECT 3", False),
        ("SELECT name FROM item WHERE 0", "SELECT name FROM item WHERE stock > 100", True),
        ("Sure!\n```sql\nSELECT 1;\n```\nHope it helps.", "SELECT 1", True),
        ("SELECT 1; DROP TABLE item", "SELECT 1", True),
    ],
)
def test_compares_rows(database, answer, gold, right):
    assert is_correct(answer, gold, database) is right


@pytest.mark.parametrize(
    "sql",
    [
        "",
        "   ",
        "I am a helpful assistant",
        "DROP TABLE item",
        "DELETE FROM item",
        "INSERT INTO item VALUES ('x', 1, 1)",
        "UPDATE item SET stock = 0",
        "CREATE TABLE other (a)",
        "ATTACH DATABASE '/tmp/evil.sqlite' AS evil",
        "PRAGMA writable_schema = ON",
        "VACUUM INTO '/tmp/evil.sqlite'",
        "BEGIN",
        "SELECT load_extension('/tmp/evil')",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n",
        "SELECT hex(zeroblob(900000000))",
        "SELECT a.name FROM item a, item b, item c, item d, item e, item f, item g, item h, item i, item j",
        "SELECT ?",
        "SELECT :name",
        "SELECT '\x00",
        "SELECT " + "(" * 5000 + "1" + ")" * 5000,
        "SELECT 1" + " " * 20_000,
        "\ud800",
    ],
)
def test_bad_queries_are_wrong_and_change_nothing(database, sql):
    assert is_correct(sql, "SELECT COUNT(*) FROM item", database) is False
    assert database.rows("SELECT COUNT(*), SUM(stock) FROM item") == [(4, 20)]


@settings(max_examples=150)
@given(st.text())
def test_any_text_is_an_answer(database, text):
    assert is_correct(text, "SELECT name, price, stock, 'gold' FROM item", database) is False


def test_a_gold_query_that_does_not_run_is_an_error(database):
    with pytest.raises(FormatError, match="gold query"):
        is_correct("SELECT 1", "SELECT nothing FROM nowhere", database)


def test_no_database(tmp_path):
    with pytest.raises(NotFoundError):
        Database(tmp_path / "none.sqlite")
    (tmp_path / "noise.sqlite").write_bytes(b"not a database at all" * 400)
    with pytest.raises(FormatError, match="not an SQLite database"):
        Database(tmp_path / "noise.sqlite")


@pytest.mark.parametrize(
    ("answer", "sql"),
    [
        ("SELECT 1", "SELECT 1"),
        ("```\nSELECT 1\n```", "SELECT 1"),
        ("```SQLite\nSELECT 1", "SELECT 1"),
        ("text ```sql SELECT 1; SELECT 2``` text", "SELECT 1"),
    ],
)
def test_extract_sql(answer, sql):
    assert extract_sql(answer) == sql


def test_same_rows_ignores_order_only_if_told():
    assert same_rows([(1, "a"), (None, 2.0)], [(None, 2), (1.0, "a")], ordered=False)
    assert not same_rows([(1,), (2,)], [(2,), (1,)], ordered=True)
    assert not same_rows([(1,), (1,), (2,)], [(1,), (2,), (2,)], ordered=False)


@pytest.mark.parametrize(
    "sql, ordered",
    [
        ("SELECT name FROM t ORDER BY COUNT(*) DESC", True),
        ("SELECT name FROM t GROUP BY name ORDER BY COUNT(*) DESC LIMIT (SELECT 3)", True),
        ("SELECT a FROM t order /* x */ -- (\n by a", True),
        ("WITH s AS (SELECT a FROM t ORDER BY a) SELECT a FROM s", False),
        ("WITH s AS (SELECT a FROM t) SELECT a FROM s UNION SELECT b FROM t ORDER BY (a)", True),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a)", False),
        ("SELECT ROW_NUMBER() OVER (ORDER BY a) FROM t", False),
        ("SELECT ')', '(' FROM t ORDER BY a", True),
        ("SELECT 'ORDER BY' AS \"order by\", [order by], `order by` FROM t -- ORDER BY a", False),
        ("SELECT '(' FROM t WHERE a IN (SELECT a FROM t ORDER BY a)", False),
        ('SELECT border, bytes FROM "order"', False),
    ],
)
def test_the_order_of_the_outermost_query_counts(sql, ordered):
    assert is_ordered(sql) is ordered


def test_a_reversed_answer_to_an_ordered_question_is_wrong(tmp_path):
    path = tmp_path / "votes.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE votes (name TEXT)")
        connection.executemany("INSERT INTO votes VALUES (?)", [("a",), ("b",), ("b",)])
    gold = "SELECT name FROM votes GROUP BY name ORDER BY COUNT(*) DESC"
    database = Database(path)
    assert is_correct(gold, gold, database)
    assert not is_correct(gold.replace("DESC", "ASC"), gold, database)


def test_a_semicolon_in_a_string_ends_no_query():
    assert extract_sql("SELECT ';' FROM t; DROP TABLE t") == "SELECT ';' FROM t"


def test_long_numbers_are_compared_whole():
    """Identifiers, telephone numbers and times in milliseconds have more than nine digits."""
    for one, other in ((1234567890, 1234567891), (1234567890.5, 1234567891.5), (2**53, 2**53 + 1)):
        assert not same_rows([(one,)], [(other,)], ordered=True)
    for one, other in ((0.1 + 0.2, 0.3), (3, 3.0), (2.9999999999999996, 3), (1234567890, 1234567890.0)):
        assert same_rows([(one,)], [(other,)], ordered=False)
