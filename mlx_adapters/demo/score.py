"""Execution accuracy, see `evaluation.sqlite`."""

from mlx_adapters.evaluation.sqlite import (
    Database as Database,
)
from mlx_adapters.evaluation.sqlite import (
    execution_accuracy as execution_accuracy,
)
from mlx_adapters.evaluation.sqlite import (
    extract_sql as extract_sql,
)
from mlx_adapters.evaluation.sqlite import (
    is_correct as is_correct,
)
from mlx_adapters.evaluation.sqlite import (
    same_rows as same_rows,
)
